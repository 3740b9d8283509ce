// Markdown to DOM nodes. Text of models and users becomes text nodes and attributes that are set one by
// one; nothing is ever parsed as HTML.

const el = (tag, className, ...children) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
};

// ---- inline ------------------------------------------------------------------------------------

const kSafeLink = /^(https?:\/\/|mailto:)/i;

// Each: where it may match, and the node it makes. The earliest match wins, of those the first.
const kInline = [
  [/(`+)([\s\S]*?[^`])\1(?!`)/, (m) => el('code', '', m[2].length > 2 && m[2].startsWith(' ') && m[2].endsWith(' ') ? m[2].slice(1, -1) : m[2])],
  [/\\([\\`*_{}[\]()#+\-.!~|<>])/, (m) => document.createTextNode(m[1])],
  [/!?\[((?:[^[\]]|\[[^[\]]*\])*)\]\(\s*<?([^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:\s+"[^"]*")?\s*\)/, (m, depth) => link(m[2], inline(m[1], depth + 1), m[0])],
  [/<(https?:\/\/[^\s<>]+)>/, (m) => link(m[1], [m[1]], m[0])],
  [/\bhttps?:\/\/[^\s<>`]*[^\s<>`.,;:!?"')\]*_]/, (m) => link(m[0], [m[0]], m[0])],
  [/\*\*(?=\S)([\s\S]*?\S)\*\*(?!\*)/, (m, depth) => el('strong', '', ...inline(m[1], depth + 1))],
  [/(?<![\w])__(?=\S)([\s\S]*?\S)__(?!\w)/, (m, depth) => el('strong', '', ...inline(m[1], depth + 1))],
  [/\*(?=[^\s*])([^*]*[^\s*])\*(?!\*)/, (m, depth) => el('em', '', ...inline(m[1], depth + 1))],
  [/(?<![\w])_(?=[^\s_])([^_]*[^\s_])_(?!\w)/, (m, depth) => el('em', '', ...inline(m[1], depth + 1))],
  [/~~(?=\S)([\s\S]*?\S)~~/, (m, depth) => el('del', '', ...inline(m[1], depth + 1))],
  [/(?: {2,}|\\)\n/, () => el('br')],
];
const kMaxDepth = 8;
const kMaxInline = 8000;  // characters of a paragraph that are looked at; a longer one stays as it is

function link(href, children, source) {
  if (!kSafeLink.test(href)) return document.createTextNode(source);
  const a = el('a', '', ...children);
  a.setAttribute('href', href);
  a.setAttribute('rel', 'noopener noreferrer nofollow');
  a.setAttribute('target', '_blank');
  return a;
}

export function inline(text, depth = 0) {
  if (depth > kMaxDepth || text.length > kMaxInline) return [document.createTextNode(text)];
  const out = [];
  // Where each rule matches next; looked for again only when that lies behind.
  const next = kInline.map(() => undefined);
  let at = 0;
  while (at < text.length) {
    let best = -1;
    for (let i = 0; i < kInline.length; ++i) {
      if (next[i] === undefined || (next[i] && next[i].index < at)) {
        const rule = new RegExp(kInline[i][0].source, 'g' + kInline[i][0].flags);
        rule.lastIndex = at;
        next[i] = rule.exec(text);
      }
      if (next[i] && (best < 0 || next[i].index < next[best].index)) best = i;
    }
    if (best < 0) break;
    const match = next[best];
    if (match.index > at) out.push(document.createTextNode(text.slice(at, match.index)));
    out.push(kInline[best][1](match, depth));
    at = match.index + match[0].length;
    next[best] = undefined;
  }
  if (at < text.length) out.push(document.createTextNode(text.slice(at)));
  return out;
}

// ---- blocks ------------------------------------------------------------------------------------

const kFence = /^( {0,3})(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const kHeading = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const kRule = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const kQuote = /^ {0,3}> ?/;
const kItem = /^( *)([-*+]|\d{1,9}[.)])(\s+|$)/;
const kTableLine = /^ {0,3}\|?[\s:|-]+$/;

const isBlank = (line) => line.trim() === '';
const cells = (line) => line.trim().replace(/^\|/, '').replace(/(?<!\\)\|$/, '').split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll('\\|', '|'));
const isTable = (lines, i) => i + 1 < lines.length && lines[i].includes('|') && kTableLine.test(lines[i + 1]) && lines[i + 1].includes('-') && cells(lines[i]).length === cells(lines[i + 1]).length;
const startsBlock = (lines, i) => kFence.test(lines[i]) || kHeading.test(lines[i]) || kRule.test(lines[i]) || kQuote.test(lines[i]) || kItem.test(lines[i]) || isTable(lines, i);

// The end of the block that begins with line i.
function blockEnd(lines, i) {
  const fence = kFence.exec(lines[i]);
  if (fence) {
    const close = new RegExp(`^ {0,3}\\${fence[2][0]}{${fence[2].length},}\\s*$`);
    let end = i + 1;
    while (end < lines.length && !close.test(lines[end])) ++end;
    return Math.min(end + 1, lines.length);
  }
  if (kHeading.test(lines[i]) || kRule.test(lines[i])) return i + 1;
  let end = i + 1;
  if (kQuote.test(lines[i])) {
    while (end < lines.length && !isBlank(lines[end]) && (kQuote.test(lines[end]) || !startsBlock(lines, end))) ++end;
    return end;
  }
  if (kItem.test(lines[i])) return listEnd(lines, i);
  if (isTable(lines, i)) {
    end = i + 2;
    while (end < lines.length && !isBlank(lines[end]) && lines[end].includes('|')) ++end;
    return end;
  }
  while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines, end)) ++end;
  return end;
}

// A paragraph does not end where a number happens to begin a line.
const interrupts = (lines, i) => startsBlock(lines, i) && !(kItem.test(lines[i]) && /^\s*\d/.test(lines[i]) && !/^\s*1[.)]/.test(lines[i]));

function listEnd(lines, i) {
  const indent = kItem.exec(lines[i])[1].length, ordered = /^\s*\d/.test(lines[i]);
  let end = i + 1;
  for (; end < lines.length; ++end) {
    if (isBlank(lines[end])) {
      const next = lines[end + 1];
      if (next === undefined || isBlank(next)) return end;
      const item = kItem.exec(next);
      if (!next.startsWith(' '.repeat(indent + 2)) && !(item && item[1].length <= indent + 1 && /^\s*\d/.test(next) === ordered && !kRule.test(next))) return end;
      continue;
    }
    const item = kItem.exec(lines[end]);
    if (kRule.test(lines[end]) && !lines[end].startsWith('  ')) return end;
    if (item && item[1].length <= indent + 1 && /^\s*\d/.test(lines[end]) !== ordered) return end;
    if (!item && !lines[end].startsWith(' '.repeat(indent + 2)) && startsBlock(lines, end)) return end;
  }
  return end;
}

// The text cut into blocks, each to be rendered by itself.
export function blocks(text) {
  const lines = text.replaceAll('\r\n', '\n').replaceAll('\t', '    ').split('\n'), out = [];
  for (let i = 0; i < lines.length;) {
    if (isBlank(lines[i])) {
      ++i;
      continue;
    }
    const end = blockEnd(lines, i);
    out.push(lines.slice(i, end).join('\n'));
    i = end;
  }
  return out;
}

export function renderBlock(source, depth = 0) {
  const lines = source.split('\n');
  const fence = kFence.exec(lines[0]);
  if (fence) return codeBlock(lines, fence);
  const heading = kHeading.exec(lines[0]);
  if (heading) return el('h' + Math.min(heading[1].length + 2, 6), '', ...inline(heading[2]));
  if (kRule.test(lines[0])) return el('hr');
  if (depth > kMaxDepth) return el('p', '', source);
  if (kQuote.test(lines[0])) return el('blockquote', '', ...renderAll(lines.map((line) => line.replace(kQuote, '')).join('\n'), depth + 1));
  if (kItem.test(lines[0])) return list(lines, depth);
  if (isTable(lines, 0)) return table(lines);
  return el('p', '', ...inline(lines.map((line) => line.replace(/^ {1,3}/, '')).join('\n')));
}

const renderAll = (text, depth) => blocks(text).map((block) => renderBlock(block, depth));

function codeBlock(lines, fence) {
  const closed = lines.length > 1 && /^ {0,3}(`{3,}|~{3,})\s*$/.test(lines.at(-1));
  const strip = new RegExp(`^ {0,${fence[1].length}}`);
  const text = lines.slice(1, closed ? -1 : undefined).map((line) => line.replace(strip, '')).join('\n');
  const copy = el('button', 'copy-code', 'Copy');
  copy.type = 'button';
  copy.setAttribute('aria-label', 'Copy the code');
  const code = el('code', '', ...highlight(text, fence[3].toLowerCase()));
  const pre = el('pre', '', code);
  pre.tabIndex = 0;  // so that the keyboard can scroll it
  return el('figure', 'code', el('figcaption', '', el('span', '', fence[3] || 'text'), copy), pre);
}

function list(lines, depth) {
  const first = kItem.exec(lines[0]), ordered = /\d/.test(first[2]);
  const items = [];
  for (const line of lines) {
    const item = kItem.exec(line);
    if (item && item[1].length <= first[1].length + 1) items.push([line.slice(item[0].length)]);
    else items.at(-1).push(line);
  }
  const width = first[0].length;
  const loose = items.some((item, i) => item.slice(0, i + 1 < items.length ? undefined : -1).some((line, at) => at > 0 && isBlank(line)));
  const node = el(ordered ? 'ol' : 'ul', '');
  if (ordered && parseInt(first[2], 10) !== 1) node.start = parseInt(first[2], 10);
  for (const item of items) {
    const text = item.map((line, i) => (i === 0 ? line : line.replace(new RegExp(`^ {0,${width}}`), ''))).join('\n');
    const task = /^\[([ xX])\]\s+/.exec(text);
    const children = renderAll(task ? text.slice(task[0].length) : text, depth + 1);
    const li = el('li', task ? 'task' : '');
    if (task) {
      const box = el('input', '');
      box.type = 'checkbox';
      box.disabled = true;
      box.checked = task[1] !== ' ';
      box.setAttribute('aria-label', box.checked ? 'Done' : 'Not done');
      li.append(box);
    }
    for (const child of children) li.append(...(!loose && child.tagName === 'P' ? child.childNodes : [child]));
    node.append(li);
  }
  return node;
}

function table(lines) {
  const aligns = cells(lines[1]).map((cell) => (cell.endsWith(':') ? (cell.startsWith(':') ? 'center' : 'right') : ''));
  const row = (line, tag) => el('tr', '', ...cells(line).slice(0, aligns.length).map((cell, i) => el(tag, aligns[i], ...inline(cell))));
  const node = el('table', '', el('thead', '', row(lines[0], 'th')), el('tbody', '', ...lines.slice(2).map((line) => row(line, 'td'))));
  const wrap = el('div', 'table', node);
  wrap.tabIndex = 0;
  return wrap;
}

// ---- code --------------------------------------------------------------------------------------

const kKeywords = new Set(('abstract and as assert async await auto begin bool break case catch char class const constexpr continue def default del delete do done double ' +
  'elif else elsif end enum except export extends extern false fi final finally float fn for foreach from func function global if impl implements import in include ' +
  'instanceof int interface internal is lambda let long loop match mod mut namespace new nil none not null nullptr of or override package pass private protected pub public ' +
  'raise ref return self short signed sizeof static struct super switch template then this throw throws trait true try type typedef typename typeof union unsafe unsigned use ' +
  'using var virtual void volatile when where while with yield select insert update create table join order group by').split(' '));
const kHashComments = new Set(['python', 'py', 'bash', 'sh', 'shell', 'zsh', 'ruby', 'rb', 'perl', 'yaml', 'yml', 'toml', 'ini', 'makefile', 'dockerfile', 'r', 'cmake', 'conf']);
const kPlain = new Set(['', 'text', 'plain', 'plaintext', 'txt', 'markdown', 'md', 'diff', 'output', 'console', 'log']);
const kMaxHighlight = 30000;

// Comments, strings, numbers and common keywords: a little colour for any language.
function highlight(text, language) {
  if (kPlain.has(language) || text.length > kMaxHighlight) return [text];
  const comment = kHashComments.has(language) ? '#[^\\n]*' : language === 'sql' || language === 'lua' || language === 'haskell' ? '--[^\\n]*' : '\\/\\/[^\\n]*|\\/\\*[\\s\\S]*?(?:\\*\\/|$)';
  const rule = new RegExp(`(${comment})|("""[\\s\\S]*?(?:"""|$)|"(?:\\\\.|[^"\\\\\\n])*"?|'(?:\\\\.|[^'\\\\\\n])*'?|\`(?:\\\\.|[^\`\\\\])*\`?)|(\\b\\d[\\w.]*\\b)|([A-Za-z_]\\w*)`, 'g');
  const out = [];
  let at = 0;
  for (const m of text.matchAll(rule)) {
    const kind = m[1] ? 'c' : m[2] ? 's' : m[3] ? 'n' : kKeywords.has(language === 'sql' ? m[4].toLowerCase() : m[4]) ? 'k' : '';
    if (!kind) continue;
    if (m.index > at) out.push(text.slice(at, m.index));
    out.push(el('span', 'hl-' + kind, m[0]));
    at = m.index + m[0].length;
  }
  out.push(text.slice(at));
  return out;
}

// ---- a message ---------------------------------------------------------------------------------

// Makes `container` show the text. Blocks that have not changed since the last call stay as they are, so
// that an answer can grow without being made anew, and text that is selected stays selected.
export function renderInto(container, text) {
  const sources = blocks(text), shown = container.shownBlocks ?? [];
  let same = 0;
  while (same < shown.length && same < sources.length && shown[same] === sources[same]) ++same;
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const source of sources.slice(same)) container.append(renderBlock(source));
  container.shownBlocks = sources;
}
