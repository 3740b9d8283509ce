// The picture of the router: a row for each layer, a column for each expert. Asks the server only while it
// is seen.
import * as api from './api.js';

const kBusyMs = 250, kIdleMs = 2000;
const $ = (id) => document.getElementById(id);

let timer = 0, open = false, shape = '', busy = () => false;

export function start(isBusy) {
  busy = isBusy;
  document.addEventListener('visibilitychange', () => schedule(0));
}

export function show(visible) {
  open = visible;
  schedule(0);
}

export const refresh = () => schedule(0);

function schedule(ms) {
  clearTimeout(timer);
  if (open && document.visibilityState === 'visible') timer = setTimeout(look, ms);
}

async function look() {
  try {
    draw(await api.get('router', { background: true }));
    schedule(busy() ? kBusyMs : kIdleMs);
  } catch {
    $('router-text').textContent = 'The server does not answer.';
    schedule(5000);
  }
}

function build(picture) {
  const grid = $('router-grid'), axis = $('router-axis');
  grid.style.setProperty('--experts', picture.experts);
  axis.style.setProperty('--experts', picture.experts);
  grid.replaceChildren();
  axis.replaceChildren(document.createElement('span'));
  const label = (text) => Object.assign(document.createElement('span'), { className: 'label', textContent: text });
  for (let e = 0; e < picture.experts; ++e) axis.append(label(e + 1));
  for (let l = 0; l < picture.layers; ++l) {
    grid.append(label(l % 4 === 0 ? l + 1 : ''));
    for (let e = 0; e < picture.experts; ++e) grid.append(Object.assign(document.createElement('span'), { className: 'cell' }));
  }
}

// 0: not used, 1 to 3: below, about, above what would be even.
function heat(uses, picture) {
  const even = (picture.window * picture.used) / picture.experts;
  return uses === 0 ? 0 : uses < even * 0.75 ? 1 : uses <= even * 1.5 ? 2 : 3;
}

function draw(picture) {
  const wanted = `${picture.layers}x${picture.experts}`;
  if (shape !== wanted) build(picture);
  shape = wanted;
  $('router').classList.toggle('is-streamed', picture.streamed);
  const children = $('router-grid').children;
  for (let l = 0; l < picture.layers; ++l)
    for (let e = 0; e < picture.experts; ++e) drawCell(children[l * (picture.experts + 1) + 1 + e], picture, l, e);
  $('router-text').textContent = describe(picture);
  $('router-grid').setAttribute('aria-label', summary(picture));
}

function drawCell(cell, picture, l, e) {
  const uses = picture.uses[l]?.[e] ?? 0, last = picture.last[l]?.includes(e);
  const present = !picture.streamed || (picture.resident[l]?.includes(e) ?? false);
  const read = last && (picture.read?.[l]?.includes(e) ?? false);
  const name = `cell h${heat(uses, picture)}${last ? ' last' : ''}${read ? ' read' : ''}${present ? '' : ' absent'}`;
  if (cell.className !== name) cell.className = name;
  const title = `Layer ${l + 1}, expert ${e + 1}: chosen for ${uses} of the last ${picture.window} tokens` + (picture.streamed ? `; ${present ? '' : 'not '}in memory` : '');
  if (cell.title !== title) cell.title = title;
}

function describe(picture) {
  const routing = `${picture.used} of ${picture.experts} experts compute each token in each of ${picture.layers} layers.`;
  if (!picture.streamed) return `${routing} All are in memory.`;
  const needed = picture.hits + picture.misses;
  const held = picture.resident.reduce((n, layer) => n + layer.length, 0);
  return `${routing} ${held} of ${picture.layers * picture.experts} are in memory` + (needed > 0 ? `, ${Math.round((100 * picture.hits) / needed)} % of those needed so far were.` : '.');
}

function summary(picture) {
  const busiest = Array.from({ length: picture.experts }, (_, e) => picture.uses.reduce((n, layer) => n + layer[e], 0));
  const total = busiest.reduce((a, b) => a + b, 0);
  if (total === 0) return 'Layers and experts; no token has been computed while this was open.';
  return 'Share of the last tokens by expert, over all layers: ' + busiest.map((n, e) => `expert ${e + 1} ${Math.round((100 * n) / total)} %`).join(', ');
}
