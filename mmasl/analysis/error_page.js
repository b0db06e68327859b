'use strict';
const $ = id => document.getElementById(id), data = JSON.parse($('data').textContent);
const BINS = data.counts[0][0].length, LEFT = 40, TOP = 34, WIDTH = 370, HEIGHT = 200;
const x = p => LEFT + WIDTH * p, y = v => TOP + HEIGHT * (1 - v);
const percent = v => v === null ? '–' : (100 * v).toFixed(1) + ' %', KINDS = ['one', 'two', 'three'];

// A heading sorts the table by its column, descending at first. Cells without a number stay last.
const table = document.querySelector('#classes table'), heads = [...table.tHead.rows[0].cells];
heads.forEach((head, column) => head.firstChild.addEventListener('click', () => {
  const down = head.ariaSort ? head.ariaSort === 'ascending' : column > 0, sign = down ? -1 : 1;
  heads.forEach(other => other.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const key = row => column ? parseFloat(row.cells[column].dataset.v) : row.cells[0].textContent;
  const rows = [...table.tBodies[0].rows].map(row => [key(row), row]);
  rows.sort(([a], [b]) => column ? isNaN(a) - isNaN(b) || sign * (a - b) || 0 : sign * a.localeCompare(b));
  table.tBodies[0].append(...rows.map(([, row]) => row));
}));
$('filter').addEventListener('input', event => {
  const text = event.target.value.toLowerCase();
  for (const row of table.tBodies[0].rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(text);
});

// Precision, recall and F1 at each threshold are sums over the histograms: thresholds are bin edges.
const line = (x1, y1, x2, y2, name) => `<line class="${name}" x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}"/>`;
const text = (x, y, anchor, words, name = '') =>
  `<text class="${name}" x="${x}" y="${y}" text-anchor="${anchor}">${words}</text>`;
function frame(ticks, labels) {
  let out = '';
  for (const [value, name] of ticks)
    out += line(LEFT, y(value), LEFT + WIDTH, y(value), 'grid') + text(LEFT - 4, y(value) + 4, 'end', name);
  for (const p of [0, 0.2, 0.4, 0.6, 0.8, 1]) out += text(x(p), TOP + HEIGHT + 15, 'middle', p);
  labels.forEach((label, i) => out += text(LEFT + 110 * i, 12, 'start', label, KINDS[i]));
  return out;
}
function path(points, name) {
  let d = '', pen = false;
  for (const [p, value] of points) {
    if (value === null) { pen = false; continue; }
    d += `${pen ? 'L' : 'M'}${x(p).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = true;
  }
  return `<path class="${name}" d="${d}"/>`;
}
function curves([negative, positive]) {
  const all = positive.reduce((a, b) => a + b, 0), found = [];
  let tp = 0, fp = 0;
  for (let k = BINS - 1; k >= 0; k--) {
    tp += positive[k]; fp += negative[k];
    found[k] = [[tp, tp + fp], [tp, all], [2 * tp, tp + fp + all]].map(([part, whole]) => whole ? part / whole : null);
  }
  return found;
}
function draw() {
  const index = +$('class').value, k = +$('threshold').value, found = curves(data.counts[index]);
  const best = found.reduce((top, now, i) => (now[2] ?? -1) > (found[top][2] ?? -1) ? i : top, 0);
  let marks = '';
  for (const [p, name] of [[data.half[index], data.rule], [data.star[index], 'p*']])
    if (p !== null)
      marks += line(x(p), TOP, x(p), TOP + HEIGHT, 'mark') + text(x(p), TOP - 5, 'middle', name);
  const cursor = line(x(k / BINS), TOP, x(k / BINS), TOP + HEIGHT, 'reading');
  $('curves').innerHTML = frame([0, 20, 40, 60, 80, 100].map(v => [v / 100, v]), ['precision', 'recall', 'F1'])
    + KINDS.map((kind, j) => path(found.map((f, i) => [i / BINS, f[j]]), kind)).join('') + marks + cursor;
  const largest = Math.max(10, ...data.counts[index].flat()), log = n => Math.log10(1 + n) / Math.log10(1 + largest);
  const ticks = [[0, 0]];
  for (let n = 1; n <= largest; n *= 10) ticks.push([log(n), n.toLocaleString('en')]);
  const steps = counts => counts.flatMap((n, i) => [[i / BINS, log(n)], [(i + 1) / BINS, log(n)]]);
  $('histogram').innerHTML = frame(ticks, ['negatives', 'positives'])
    + data.counts[index].map((counts, i) => path(steps(counts), KINDS[i])).join('') + marks + cursor;
  const [precision, recall, f1] = found[k].map(percent), gap = data.gap[index];
  $('reading').textContent = `p > ${(k / BINS).toFixed(2)}: precision ${precision}, recall ${recall}, F1 ${f1}. `
    + `Best F1 ${percent(found[best][2])} at p > ${(best / BINS).toFixed(2)}. `
    + `Probability gap ${gap === null ? '–' : gap.toFixed(3)}.`;
}
function start() {
  $('threshold').value = Math.round(BINS * (data.half[+$('class').value] ?? 0.5));
  draw();
}
$('class').addEventListener('change', start);
$('threshold').addEventListener('input', draw);
for (const link of document.querySelectorAll('a[data-class]'))
  link.addEventListener('click', () => { $('class').value = link.dataset.class; start(); });
start();
