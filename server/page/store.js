// What this browser keeps: conversations, settings, the key. Nothing of it leaves but in requests to the
// server of this page.

const kPrefix = 'duet.';
const kIndex = kPrefix + 'conversations';

// What does not parse, or was written by another version, counts as absent.
function read(key, fallback) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? fallback;
  } catch {
    return fallback;
  }
}

// False when the browser has no room for it (or keeps nothing, in private windows).
function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

// ---- conversations: [{id, title, updated}], newest first ----------------------------------------

const isText = (value) => typeof value === 'string';

export function conversations() {
  const list = read(kIndex, []);
  return (Array.isArray(list) ? list : []).filter((c) => c && isText(c.id) && isText(c.title)).sort((a, b) => (b.updated ?? 0) - (a.updated ?? 0));
}

// {id, title, updated, system, messages: [{role, versions: [{text, stats?, error?}], at}]}
export function load(id) {
  const c = read(kPrefix + 'conversation.' + id, null);
  if (!c || c.id !== id || !Array.isArray(c.messages)) return null;
  c.messages = c.messages.filter((m) => m && (m.role === 'user' || m.role === 'assistant') && Array.isArray(m.versions) && m.versions.length > 0 && m.versions.every((v) => v && isText(v.text)));
  for (const m of c.messages) m.at = Math.min(Math.max(m.at | 0, 0), m.versions.length - 1);
  c.system = isText(c.system) ? c.system : '';
  c.title = isText(c.title) ? c.title : '';
  return c;
}

export function save(conversation) {
  const others = conversations().filter((c) => c.id !== conversation.id);
  const { id, title, updated } = conversation;
  return write(kPrefix + 'conversation.' + id, conversation) && write(kIndex, [{ id, title, updated }, ...others]);
}

export function remove(id) {
  localStorage.removeItem(kPrefix + 'conversation.' + id);
  write(kIndex, conversations().filter((c) => c.id !== id));
}

// getRandomValues, because randomUUID needs HTTPS or localhost.
export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36).padStart(2, '0')).join('');

export const isIndexKey = (key) => key === kIndex;

// ---- settings -----------------------------------------------------------------------------------

export const settings = () => ({ system: '', stop: [], ...read(kPrefix + 'settings', {}) });
export const saveSettings = (value) => write(kPrefix + 'settings', value);

export const current = () => sessionStorage.getItem(kPrefix + 'current');
export const setCurrent = (id) => sessionStorage.setItem(kPrefix + 'current', id);

export const preference = (name, fallback) => read(kPrefix + name, fallback);
export const setPreference = (name, value) => write(kPrefix + name, value);

// ---- the key: for this tab, or for longer if wanted ---------------------------------------------

export const key = () => sessionStorage.getItem(kPrefix + 'key') ?? localStorage.getItem(kPrefix + 'key') ?? '';
export function setKey(value, keep) {
  localStorage.removeItem(kPrefix + 'key');
  sessionStorage.setItem(kPrefix + 'key', value);
  if (keep) localStorage.setItem(kPrefix + 'key', value);
}
