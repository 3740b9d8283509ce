// The page: what is shown, what was asked, answers that are being written.
import * as api from './api.js';
import * as dialogs from './dialogs.js';
import { conversationNodes, editNode, messageNode, updateAnswer, versionOf } from './messages.js';
import * as router from './router.js';
import * as store from './store.js';

const $ = (id) => document.getElementById(id);
const kSaveMs = 1000, kNearEnd = 80, kMaxSpoken = 2000;

let conversation = null;    // the one that is shown
const answers = new Map();  // conversation id -> {conversation, message, controller, progress, rate, saved}
let server = { chat: true, allInMemory: false };

const live = () => answers.get(conversation.id);

// ---- showing -----------------------------------------------------------------------------------

const contextOf = (message) => ({ isLast: message === conversation.messages.at(-1), live: live()?.message === message ? live() : null });

function draw() {
  $('messages').replaceChildren(...conversation.messages.map((m) => messageNode(m, contextOf(m))));
  $('empty').hidden = conversation.messages.length > 0;
  $('title').textContent = conversation.title || 'New conversation';
  document.title = conversation.title ? `${conversation.title} · duet` : 'duet';
  drawControls();
}

function drawControls() {
  const busy = live() !== undefined;
  $('stop').hidden = !busy;
  $('messages').classList.toggle('busy', busy);
  $('send').hidden = busy;
  $('send').disabled = $('message').value.trim() === '' || !server.chat;
}

function drawList() {
  $('conversations').replaceChildren(...conversationNodes(store.conversations(), conversation.id));
}

const isNearEnd = () => $('scroll').scrollHeight - $('scroll').scrollTop - $('scroll').clientHeight < kNearEnd;
const scrollToEnd = () => { $('scroll').scrollTop = $('scroll').scrollHeight; };
const showToEnd = () => { $('to-end').hidden = isNearEnd() || conversation.messages.length === 0; };

let frame = 0;
function drawAnswer() {
  if (frame) return;
  frame = requestAnimationFrame(() => {
    frame = 0;
    const message = conversation.messages.at(-1), node = $('messages').lastElementChild;
    if (!message || message.role !== 'assistant' || !node || node.querySelector('form')) return;
    const follow = isNearEnd();
    updateAnswer(node, message, contextOf(message));
    if (follow) scrollToEnd();
    showToEnd();
  });
}

function say(text) {
  $('live').textContent = text.slice(0, kMaxSpoken);
}

function notice(text) {
  $('notice').textContent = text;
  $('notice').hidden = !text;
}

// ---- conversations -----------------------------------------------------------------------------

const blank = () => ({ id: store.newId(), title: '', updated: Date.now(), system: store.settings().system, messages: [] });

function keep(c) {
  if (c.messages.length > 0 && !store.save(c)) notice('This browser has no room left for conversations. Delete some, or this one will be lost when the page closes.');
}

function show(c) {
  conversation = c;
  store.setCurrent(c.id);
  draw();
  drawList();
  scrollToEnd();
  showToEnd();
  openSidebar(false);
}

function open(id) {
  const c = answers.get(id)?.conversation ?? store.load(id);
  show(c ?? blank());
}

async function removeConversation(id) {
  const title = store.conversations().find((c) => c.id === id)?.title ?? '';
  if (!(await dialogs.confirm(`Delete “${title}”? It is kept nowhere else.`))) return;
  answers.get(id)?.controller.abort();
  answers.delete(id);
  store.remove(id);
  if (id === conversation.id) show(blank());
  else drawList();
  $('new-chat').focus();
}

// ---- asking ------------------------------------------------------------------------------------

const titleOf = (text) => {
  const line = text.trim().split('\n')[0];
  return line.length > 60 ? line.slice(0, 58).trimEnd() + '…' : line;
};

function send(text) {
  if (!text.trim() || live() || !server.chat) return;
  conversation.messages.push({ role: 'user', versions: [{ text }], at: 0 });
  conversation.title ||= titleOf(text);
  answer(conversation, { role: 'assistant', versions: [], at: 0 });
}

// A new version of the answer, the last message.
function again() {
  const message = conversation.messages.at(-1);
  if (live() || message?.role !== 'assistant') return;
  if (versionOf(message).error && !versionOf(message).text) message.versions.splice(message.at, 1);
  conversation.messages.pop();
  answer(conversation, message);
}

function requestMessages(c) {
  const out = c.system ? [{ role: 'system', content: c.system }] : [];
  for (const m of c.messages) if (versionOf(m).text) out.push({ role: m.role, content: versionOf(m).text });
  return out;
}

async function answer(c, message) {
  const messages = requestMessages(c), version = { text: '' };
  message.at = message.versions.push(version) - 1;
  c.messages.push(message);
  const job = { conversation: c, message, controller: new AbortController(), saved: Date.now(), n: 0 };
  answers.set(c.id, job);
  touch(c);
  if (c === conversation) {
    draw();
    scrollToEnd();
    say('Waiting for the answer.');
  }
  router.refresh();
  try {
    await api.chat(messages, dialogs.parameters(), job.controller.signal, (event) => take(job, version, event));
  } catch (e) {
    if (e.name === 'AbortError') version.stopped = true;
    else version.error = e.message;
  }
  if (answers.get(c.id) === job) finish(job, version);
}

function take(job, version, event) {
  if (event.progress) job.progress = event.progress;
  if (event.text) {
    version.text += event.text;
    job.first ??= performance.now();
    const seconds = (performance.now() - job.first) / 1000;
    if (++job.n > 4 && seconds > 0.5) job.rate = (job.n - 1) / seconds;
  }
  if (event.reason) version.stats = statsOf(event);
  if (Date.now() - job.saved > kSaveMs) {
    keep(job.conversation);
    job.saved = Date.now();
  }
  if (job.conversation === conversation) drawAnswer();
}

function statsOf({ timings: t, reason }) {
  if (!t) return { tokens: 0, reason };
  return { tokens: t.predicted_n, rate: t.predicted_per_second, promptTokens: t.prompt_n, promptRate: t.prompt_per_second, hitRate: t.expert_hit_rate, allInMemory: server.allInMemory, reason };
}

function finish(job, version) {
  answers.delete(job.conversation.id);
  keep(job.conversation);
  if (job.conversation !== conversation) return;
  const follow = isNearEnd(), hadFocus = document.activeElement === $('stop') || document.activeElement === document.body;
  draw();
  if (follow) scrollToEnd();
  if (hadFocus) $('message').focus({ preventScroll: true });
  say(version.error ? `No answer: ${version.error}` : version.stopped ? 'Stopped.' : `Answer: ${version.text}`);
}

function touch(c) {
  c.updated = Date.now();
  keep(c);
  drawList();
}

// ---- what the buttons of a message do ----------------------------------------------------------

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // not over plain HTTP to another machine
    const area = Object.assign(document.createElement('textarea'), { value: text, className: 'hidden' });
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
    button.focus();
  }
  say('Copied.');
  const before = [...button.childNodes];
  button.replaceChildren('Copied');
  setTimeout(() => button.replaceChildren(...before), 1200);
}

function edit(index) {
  if (live()) return;
  const message = conversation.messages[index], node = $('messages').children[index], user = message.role === 'user';
  const form = editNode(versionOf(message).text, { label: user ? 'Edit the message' : 'Edit the answer', save: user ? 'Send' : 'Save' }, (text) => {
    if (text === null || text.trim() === '' || live()) {
      draw();
      $('message').focus();
    } else if (user) resend(index, text);
    else amend(message, text);
  });
  node.querySelector('.body').replaceWith(form);
  node.querySelector('.foot').remove();
  form.querySelector('textarea').focus();
}

function resend(index, text) {
  conversation.messages.length = index;
  if (index === 0) conversation.title = '';
  send(text);
  $('message').focus();
}

function amend(message, text) {
  Object.assign(versionOf(message), { text, edited: true });
  delete versionOf(message).error;
  touch(conversation);
  draw();
  $('message').focus();
}

function turn(index, by) {
  const message = conversation.messages[index];
  message.at = Math.min(Math.max(message.at + by, 0), message.versions.length - 1);
  touch(conversation);
  draw();
  $('messages').children[index].querySelector(`[data-action="${by < 0 ? 'before' : 'after'}"]`)?.focus();
}

function onMessageClick(e) {
  const button = e.target.closest('button');
  if (!button) return;
  if (button.classList.contains('copy-code')) return copy(button.closest('figure').querySelector('code').textContent, button);
  const index = [...$('messages').children].indexOf(button.closest('.message'));
  if (index < 0) return;
  const action = button.dataset.action;
  if (action === 'copy') copy(versionOf(conversation.messages[index]).text, button);
  else if (action === 'edit') edit(index);
  else if (action === 'again') again();
  else if (action === 'before' || action === 'after') turn(index, action === 'before' ? -1 : 1);
}

// ---- frame -------------------------------------------------------------------------------------

function openSidebar(isOpen) {
  const was = $('sidebar').classList.contains('open');
  $('sidebar').classList.toggle('open', isOpen);
  $('scrim').hidden = !isOpen;
  $('open-sidebar').setAttribute('aria-expanded', String(isOpen));
  if (isOpen) $('new-chat').focus();
  else if (was) $('open-sidebar').focus();
}

function openRouter(isOpen) {
  $('router').hidden = !isOpen;
  $('scrim').hidden = !(isOpen && matchMedia('(max-width: 760px)').matches);
  $('toggle-router').setAttribute('aria-expanded', String(isOpen));
  store.setPreference('router', isOpen);
  router.show(isOpen);
}

function fitMessage() {
  const area = $('message');
  area.style.height = 'auto';
  area.style.height = `${area.scrollHeight}px`;
  drawControls();
}

function submit(e) {
  e?.preventDefault();
  if (live() || !server.chat) return;
  const text = $('message').value;
  if (!text.trim()) return;
  $('message').value = '';
  fitMessage();
  send(text);
}

function onMessageKey(e) {
  if (e.key === 'Enter' && !e.shiftKey && !e.isComposing) submit(e);
  if (e.key === 'ArrowUp' && $('message').value === '' && !live()) {
    const last = conversation.messages.findLastIndex((m) => m.role === 'user');
    if (last >= 0) {
      e.preventDefault();
      edit(last);
    }
  }
}

function onKey(e) {
  if (e.key !== 'Escape' || document.querySelector('dialog[open]')) return;
  if ($('sidebar').classList.contains('open')) openSidebar(false);
  else if ($('scrim').getClientRects().length > 0) openRouter(false);
  else live()?.controller.abort();
}

async function settings() {
  const saved = await dialogs.editSettings(conversation.system, (system) => {
    conversation.system = system;
    keep(conversation);
  });
  if (saved) say('Settings saved.');
}

function listen() {
  $('composer').addEventListener('submit', submit);
  $('message').addEventListener('input', fitMessage);
  $('message').addEventListener('keydown', onMessageKey);
  $('stop').addEventListener('click', () => live()?.controller.abort());
  $('messages').addEventListener('click', onMessageClick);
  $('new-chat').addEventListener('click', () => { show(blank()); $('message').focus(); });
  $('conversations').addEventListener('click', (e) => {
    const button = e.target.closest('button');
    if (button?.dataset.action === 'open') open(button.dataset.id);
    if (button?.dataset.action === 'delete') removeConversation(button.dataset.id);
  });
  $('open-settings').addEventListener('click', settings);
  $('toggle-router').addEventListener('click', () => openRouter($('router').hidden));
  $('close-router').addEventListener('click', () => { openRouter(false); $('toggle-router').focus(); });
  $('open-sidebar').addEventListener('click', () => openSidebar(true));
  $('close-sidebar').addEventListener('click', () => openSidebar(false));
  $('scrim').addEventListener('click', () => { openSidebar(false); if (!$('router').hidden) openRouter(false); });
  $('to-end').addEventListener('click', scrollToEnd);
  $('scroll').addEventListener('scroll', showToEnd, { passive: true });
  document.addEventListener('keydown', onKey);
  document.addEventListener('click', (e) => e.target.closest('[data-close]')?.closest('dialog').close(''));
  addEventListener('resize', () => { if ($('to-end').hidden) scrollToEnd(); });
  addEventListener('storage', (e) => { if (store.isIndexKey(e.key)) drawList(); });
  addEventListener('pagehide', () => { for (const job of answers.values()) keep(job.conversation); });
  for (const input of document.querySelectorAll('input[name="theme"]')) {
    input.checked = input.value === store.preference('theme', 'auto');
    input.addEventListener('change', () => { store.setPreference('theme', input.value); dispatchEvent(new Event('themechange')); });
  }
}

async function meetServer() {
  try {
    const props = await api.get('props');
    const settings = props.default_generation_settings;
    server.chat = props.chat_template !== '';
    dialogs.build(settings.params ?? {});
    $('model').textContent = `${props.model_alias} · ${settings.n_ctx} tokens of context`;
    if (!server.chat) notice('This model has no chat template, so it cannot answer messages. Start the server with --template NAME, or use its completion routes.');
    const picture = await api.get('router');
    server.allInMemory = picture.layers > 0 && !picture.streamed;
    $('toggle-router').hidden = picture.layers === 0;
    if (picture.layers > 0 && store.preference('router', false) && innerWidth > 1080) openRouter(true);
  } catch (e) {
    notice(e.status === 401 ? 'The server answers nobody without its key. Reload the page to enter it.' : e.message);
  }
  drawControls();
}

dialogs.build({});
api.onKeyNeeded(dialogs.askForKey);
router.start(() => answers.size > 0);
listen();
open(store.current() ?? store.conversations()[0]?.id ?? '');
meetServer();
