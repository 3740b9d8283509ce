// Requests to the server of this page.
import * as store from './store.js';

// status 0: no answer at all.
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Asks for a key; resolves to whether there is a new one. Set by the page.
let askForKey = async () => false;
export const onKeyNeeded = (ask) => { askForKey = ask; };

async function send(path, options = {}) {
  const headers = { ...options.headers };
  if (store.key()) headers.Authorization = 'Bearer ' + store.key();
  let reply;
  try {
    reply = await fetch(path, { ...options, headers, cache: 'no-store', credentials: 'omit' });
  } catch (e) {
    if (e.name === 'AbortError') throw e;
    throw new ServerError(0, 'The server does not answer. Is it still running?');
  }
  if (reply.status === 401 && !options.background && (await askForKey(store.key() !== ''))) return send(path, options);
  if (!reply.ok) throw new ServerError(reply.status, await messageOf(reply));
  return reply;
}

async function messageOf(reply) {
  try {
    const { error } = await reply.json();
    return (typeof error === 'string' ? error : error.message) || reply.statusText;
  } catch {
    return `The server answered with status ${reply.status}.`;
  }
}

export const get = async (path, options) => (await send(path, options)).json();

// The data of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines) if (line.startsWith('data: ')) yield line.slice(6);
  }
}

// Streams the answer to messages; `on` is told of {text}, {progress}, and at the end {timings, reason}.
export async function chat(messages, parameters, signal, on) {
  const body = JSON.stringify({ ...parameters, messages, stream: true, return_progress: true });
  const reply = await send('v1/chat/completions', { method: 'POST', body, signal, headers: { 'Content-Type': 'application/json' } });
  let complete = false;
  for await (const data of events(reply.body)) {
    if (data === '[DONE]') {
      complete = true;
      break;
    }
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(500, event.error.message);
    const choice = event.choices?.[0];
    if (choice?.delta?.content) on({ text: choice.delta.content });
    if (event.prompt_progress) on({ progress: event.prompt_progress });
    if (choice?.finish_reason) on({ timings: event.timings, reason: choice.finish_reason });
  }
  if (!complete) throw new ServerError(0, 'The connection to the server broke off.');
}
