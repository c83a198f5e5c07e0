// Elements of HTML and SVG, and numbers as people read them. Data only ever becomes text or an attribute.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

export function html(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// 0.1234 -> "12.3 %"
export function percentText(share) {
  return `${(100 * share).toFixed(1)} %`;
}

// 0.1234 -> "12.3 %", and 1 -> "100 %"
export function shareText(share) {
  return `${numberText(100 * share)} %`;
}

// Three digits, or a whole number as it is.
export function numberText(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${numberText(value / 1e9)} G`;
  if (size >= 1e6) return `${numberText(value / 1e6)} M`;
  if (size >= 1e4) return `${numberText(value / 1e3)} k`;
  if (Number.isInteger(value)) return String(value);
  return size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : value.toFixed(2);
}

// Seconds as "12.3 ms".
export function durationText(seconds) {
  if (seconds === 0) return "0";
  if (seconds >= 1) return `${numberText(seconds)} s`;
  return seconds >= 1e-3 ? `${numberText(seconds * 1e3)} ms` : `${numberText(seconds * 1e6)} µs`;
}

// About `num` round numbers in [from, to].
export function roundTicks(from, to, num) {
  const rough = (to - from) / num;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((it) => it * power >= rough);
  const found = [];
  for (let at = Math.ceil(from / step) * step; at <= to; at += step) found.push(at);
  return found;
}

// Microseconds on an axis, with as many digits as tell a tick from the next, `step` on.
export function tickText(at, step) {
  if (at === 0) return "0";
  const [unit, size] = at >= 1e6 ? ["s", 1e6] : at >= 1e3 ? ["ms", 1e3] : ["µs", 1];
  const digits = Math.ceil(-Math.log10(step / size) - 1e-9);
  return `${(at / size).toFixed(Math.min(6, Math.max(0, digits || 0)))} ${unit}`;
}

export function bytesText(bytes) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (bytes >= size) return `${numberText(bytes / size)} ${unit}`;
  }
  return `${bytes} bytes`;
}

// "rank 3 (stage 1, tp 1)" -> "rank 3"
export function shortName(name) {
  return name.split(" (")[0];
}

// A table for who cannot see the picture. `rows` are lists of texts; the first of each names it.
export function tableOf(caption, heads, rows) {
  const cell = (text, index) => (index ? html("td", {}, text) : html("th", { scope: "row" }, text));
  return html(
    "table",
    {},
    html("caption", {}, caption),
    html("thead", {}, html("tr", {}, ...heads.map((it) => html("th", { scope: "col" }, it)))),
    html("tbody", {}, ...rows.map((row) => html("tr", {}, ...row.map(cell)))),
  );
}
