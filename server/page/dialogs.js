// Settings, the key, questions.
import { el } from './messages.js';
import * as store from './store.js';

const $ = (id) => document.getElementById(id);

// Resolves to the value of the button that closed it; "" when dismissed.
function ask(dialog, focus) {
  return new Promise((resolve) => {
    dialog.returnValue = '';
    dialog.addEventListener('close', () => resolve(dialog.returnValue), { once: true });
    dialog.showModal();
    focus?.focus();
  });
}

// ---- sampling ----------------------------------------------------------------------------------

// name: of the request's field; the bounds are the server's.
const kSampling = [
  { name: 'temperature', label: 'Temperature', least: 0, most: 10, step: 0.05 },
  { name: 'top_p', label: 'Top p', least: 0, most: 1, step: 0.01 },
  { name: 'top_k', label: 'Top k', least: 0, most: 1000, step: 1 },
  { name: 'min_p', label: 'Min p', least: 0, most: 1, step: 0.01 },
  { name: 'repeat_penalty', label: 'Repeat penalty', least: 0.5, most: 3, step: 0.05 },
  { name: 'max_tokens', label: 'Most tokens', least: 1, most: 1000000, step: 1 },
  { name: 'seed', label: 'Seed', least: 0, most: Number.MAX_SAFE_INTEGER, step: 1 },
];

export function build(defaults) {
  const box = $('sampling');
  box.replaceChildren();
  for (const f of kSampling) {
    const hint = f.name === 'seed' ? 'random' : f.name === 'max_tokens' ? 'no limit' : defaults[f.name] === undefined ? '' : String(+(+defaults[f.name]).toFixed(4));
    box.append(el('label', {}, f.label, el('input', { id: 'set-' + f.name, type: 'number', min: f.least, max: f.most, step: f.step, placeholder: hint, inputMode: 'decimal', autocomplete: 'off' })));
  }
  box.append(el('p', { id: 'sampling-wrong', className: 'wrong', hidden: true, role: 'alert' }));
}

// What the fields say; null and a message when one is out of its bounds.
function readSampling() {
  const out = {};
  let wrong = null;
  for (const f of kSampling) {
    const input = $('set-' + f.name), text = input.value.trim(), value = Number(text);
    const whole = f.step === 1, ok = !input.validity.badInput && (text === '' || (value >= f.least && value <= f.most && (!whole || Number.isInteger(value))));
    input.setAttribute('aria-invalid', String(!ok));
    if (!ok) wrong ??= { input, text: `${f.label}: ${whole ? 'a whole number' : 'a number'} from ${f.least} to ${f.most}.` };
    else if (text !== '') out[f.name] = value;
  }
  $('sampling-wrong').hidden = !wrong;
  $('sampling-wrong').textContent = wrong?.text ?? '';
  wrong?.input.focus();
  return wrong ? null : out;
}

function fill(system, settings) {
  $('set-system').value = system;
  $('set-stop').value = settings.stop.join('\n');
  for (const f of kSampling) $('set-' + f.name).value = settings[f.name] ?? '';
  readSampling();
}

// The fields of a request.
export function parameters() {
  const settings = store.settings(), out = {};
  for (const f of kSampling) if (typeof settings[f.name] === 'number') out[f.name] = settings[f.name];
  if (Array.isArray(settings.stop) && settings.stop.length > 0) out.stop = settings.stop;
  return out;
}

// save: gets the system prompt, before anything can be sent. True when all is over and it has.
export async function editSettings(system, save) {
  fill(system, store.settings());
  let saved = false;
  $('settings-form').onsubmit = (e) => {
    if (e.submitter?.value !== 'save') return;
    const sampling = readSampling();
    if (!sampling) return e.preventDefault();
    const stop = $('set-stop').value.split('\n').filter((line) => line !== '').slice(0, 16);
    const wanted = $('set-system').value.trim();
    store.saveSettings({ ...sampling, stop, system: wanted });
    save(wanted);
    saved = true;
  };
  $('reset-settings').onclick = () => fill('', { stop: [] });
  await ask($('settings'), $('set-system'));
  return saved;
}

// ---- the key, questions ------------------------------------------------------------------------

let asking = null;

export function askForKey(wasWrong) {
  asking ??= (async () => {
    $('key-title').textContent = wasWrong ? 'The key is wrong' : 'This server asks for a key';
    $('key').value = '';
    const given = await ask($('key-dialog'), $('key'));
    asking = null;
    if (given !== 'save' || !$('key').value) return false;
    store.setKey($('key').value, $('key-keep').checked);
    $('key').value = '';
    return true;
  })();
  return asking;
}

export async function confirm(text) {
  $('confirm-text').textContent = text;
  return (await ask($('confirm'), $('confirm-yes'))) === 'yes';
}
