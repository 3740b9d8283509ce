// The list of messages: nodes for what a conversation holds. Knows nothing of the server.
import { renderInto } from './markdown.js';

const kIcons = {
  copy: 'M7 7h9v10H7zM4 13V3h9', edit: 'M12.5 4.5l3 3L7 16H4v-3zM10.5 6.5l3 3', again: 'M15.5 10a5.5 5.5 0 1 1-1.7-4M14 2.8V6h-3.2',
  before: 'M12 5l-5 5 5 5', after: 'M8 5l5 5-5 5', done: 'M4 10.5l4 4 8-9',
};

export function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  svg.setAttribute('viewBox', '0 0 20 20');
  svg.setAttribute('aria-hidden', 'true');
  const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  path.setAttribute('d', kIcons[name] ?? name);
  svg.append(path);
  return svg;
}

export function el(tag, properties = {}, ...children) {
  const { dataset, ...rest } = properties;
  const node = Object.assign(document.createElement(tag), rest);
  Object.assign(node.dataset, dataset);
  node.append(...children);
  return node;
}

const button = (action, label, ...children) => {
  const node = el('button', { type: 'button', dataset: { action } }, ...children);
  if (label) node.setAttribute('aria-label', label);
  return node;
};

export const versionOf = (message) => message.versions[message.at];

// ---- one message -------------------------------------------------------------------------------

// `live`: {progress, rate} while it is being written.
export function messageNode(message, { isLast, live }) {
  const user = message.role === 'user';
  const node = el('li', { className: 'message ' + message.role });
  node.append(el('h3', { className: 'hidden', textContent: user ? 'You' : 'Model' }));
  const body = el('div', { className: user ? 'body' : 'body text' });
  node.append(body);
  if (user) {
    body.textContent = versionOf(message).text;
    node.append(el('div', { className: 'foot' }, userActions()));
    return node;
  }
  node.append(el('div', { className: 'state' }), el('div', { className: 'foot' }));
  updateAnswer(node, message, { isLast, live });
  return node;
}

const userActions = () => el('div', { className: 'actions' }, button('copy', 'Copy the message', icon('copy')), button('edit', 'Edit the message', icon('edit')));

export function updateAnswer(node, message, { isLast, live }) {
  const version = versionOf(message), [body, state, foot] = [node.querySelector('.body'), node.querySelector('.state'), node.querySelector('.foot')];
  renderInto(body, version.text);
  node.setAttribute('aria-busy', live ? 'true' : 'false');
  if (live && !version.text) showWaiting(state, live.progress);
  else state.replaceChildren(...problemNodes(version, live));
  if (live) foot.replaceChildren(...(live.rate ? [el('span', { textContent: `${figure(live.rate)} tok/s` })] : []));
  else foot.replaceChildren(...answerFoot(message, version, isLast));
}

function problemNodes(version, live) {
  if (live || !version.error) return [];
  return [el('div', { className: 'failed' }, el('span', { textContent: version.error }), button('again', '', 'Try again'))];
}

function showWaiting(state, progress) {
  if (!state.querySelector('.waiting')) {
    const bar = el('progress', { max: 1, hidden: true });
    bar.setAttribute('aria-label', 'Prompt read');
    state.replaceChildren(el('div', { className: 'waiting' }, el('span', { className: 'dots' }, el('i'), el('i')), el('span', { className: 'words', textContent: 'Waiting for the server' }), bar));
  }
  if (!progress) return;
  const left = progress.total - progress.processed;
  state.querySelector('.words').textContent = left > 0 ? `Reading ${progress.total} tokens` : 'Thinking';
  const bar = state.querySelector('progress');
  bar.hidden = left <= 0 || progress.total < 64;
  bar.value = progress.processed / progress.total;
}

function answerFoot(message, version, isLast) {
  const actions = el('div', { className: 'actions' }, button('copy', 'Copy the answer', icon('copy')), button('edit', 'Edit the answer', icon('edit')));
  if (isLast) actions.append(button('again', 'Answer again', icon('again'), ''));
  const out = version.text ? [actions] : [];
  if (!version.text && !version.error && isLast) out.push(el('div', { className: 'actions' }, button('again', 'Answer again', icon('again'))));
  if (message.versions.length > 1) out.push(versions(message));
  const words = statsText(version);
  if (words) out.push(el('span', { className: 'stats', textContent: words }));
  return out;
}

function versions(message) {
  const before = button('before', 'Answer before', icon('before')), after = button('after', 'Answer after', icon('after'));
  before.disabled = message.at === 0;
  after.disabled = message.at === message.versions.length - 1;
  return el('span', { className: 'versions' }, before, el('span', { textContent: `${message.at + 1} of ${message.versions.length}` }), after);
}

const figure = (n) => (n >= 100 ? n.toFixed(0) : n.toFixed(1));
const count = (n, word) => `${n} ${word}${n === 1 ? '' : 's'}`;

export function statsText(version) {
  const s = version.stats, out = [];
  if (version.stopped) out.push('stopped');
  if (version.edited) out.push('edited');
  if (s) {
    out.push(count(s.tokens, 'token'));
    if (s.rate > 0) out.push(`${figure(s.rate)} tok/s`);
    if (s.promptTokens > 0 && s.promptRate > 0) out.push(`prompt ${figure(s.promptRate)} tok/s`);
    if (s.hitRate !== undefined) out.push(`experts ${Math.round(100 * s.hitRate)}\u00a0% in memory`);
    else if (s.allInMemory) out.push('all experts in memory');
    if (s.reason === 'length') out.push('cut off at the limit');
  }
  return out.join(' · ');
}

// ---- editing -----------------------------------------------------------------------------------

// Instead of the message's text; `done` gets the new text, or null.
export function editNode(text, { label, save }, done) {
  const area = el('textarea', { value: text, rows: Math.min(Math.max(text.split('\n').length, 3), 14) });
  area.setAttribute('aria-label', label);
  const cancel = el('button', { type: 'button', className: 'plain', textContent: 'Cancel' });
  const ok = el('button', { type: 'submit', className: 'primary', textContent: save });
  const form = el('form', { className: 'edit' }, area, el('div', { className: 'row' }, cancel, ok));
  cancel.onclick = () => done(null);
  form.onsubmit = (e) => {
    e.preventDefault();
    done(area.value);
  };
  area.onkeydown = (e) => {
    if (e.key === 'Escape') done(null);
    if (e.key === 'Enter' && (e.ctrlKey || e.metaKey)) form.requestSubmit();
    if (e.key === 'Escape') e.stopPropagation();
  };
  return form;
}

// ---- the list of conversations -----------------------------------------------------------------

function dayOf(time) {
  const day = (t) => new Date(t).setHours(0, 0, 0, 0);
  const days = Math.round((day(Date.now()) - day(time)) / 86400000);
  return days <= 0 ? 'Today' : days === 1 ? 'Yesterday' : days < 7 ? 'This week' : 'Earlier';
}

export function conversationNodes(list, currentId) {
  if (list.length === 0) return [el('li', { className: 'none', textContent: 'None yet' })];
  const out = [];
  let group = '';
  for (const c of list) {
    const day = dayOf(c.updated ?? 0);
    if (day !== group) out.push(el('li', { className: 'group', textContent: day }));
    group = day;
    const open = el('button', { type: 'button', className: 'open', textContent: c.title, title: c.title, dataset: { action: 'open', id: c.id } });
    if (c.id === currentId) open.setAttribute('aria-current', 'true');
    const remove = el('button', { type: 'button', className: 'delete', dataset: { action: 'delete', id: c.id } }, icon('M5 6h10M8 6V4h4v2M6.5 6l.6 10h5.8l.6-10'));
    remove.setAttribute('aria-label', `Delete “${c.title}”`);
    out.push(el('li', { className: 'item' + (c.id === currentId ? ' current' : '') }, open, remove));
  }
  return out;
}
