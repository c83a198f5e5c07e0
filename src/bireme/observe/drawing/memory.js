// Bytes of each rank by kind, as a stacked bar and as a table: held as it was measured, or as it was planned. Takes
//   [{name, bytes: {kind: bytes}, reserved_cache: bytes or null}]; a kind that is not there is not drawn.

import { bytesText, html, shortName, svg, tableOf } from "./elements.js";

const MEMORY_KINDS = [
  ["weights", "weights"],
  ["weights_held", "weights in memory"],
  ["kv", "KV cache, reserved"],
  ["kv_held", "KV cache in memory"],
  ["steps", "steps, planned"],
  ["activations", "activations, measured"],
  ["communication", "communication"],
  ["other", "other"],
];

function totalBytes(rank) {
  return Object.values(rank.bytes).reduce((sum, bytes) => sum + bytes, 0);
}

export function mostBytes(ranks) {
  return Math.max(1, ...ranks.map(totalBytes));
}

function memoryBar(rank, most) {
  let at = 0;
  const parts = [];
  for (const [kind, label] of MEMORY_KINDS) {
    const bytes = rank.bytes[kind] ?? 0;
    const place = { x: `${(100 * at) / most}%`, width: `${(100 * bytes) / most}%`, height: "100%" };
    parts.push(svg("rect", { ...place, class: `memory-${kind}` }, svg("title", {}, `${label} ${bytesText(bytes)}`)));
    at += bytes;
  }
  return svg("svg", { class: "ledger-bar", width: "100%", height: 16, "aria-hidden": "true" }, ...parts);
}

function memoryLegend(kinds) {
  const entry = ([kind, label]) =>
    html("li", {}, svg("svg", { width: 14, height: 10, "aria-hidden": "true" }, svg("rect", { width: 14, height: 10, class: `memory-${kind}` })), label);
  return html("ul", { class: "legend" }, ...kinds.map(entry));
}

// `caption` and `total` say of what the bytes are.
export class MemoryView {
  constructor(place, { caption, total }) {
    [this.caption, this.total] = [caption, total];
    this.bars = html("div", { class: "ledger-bars" });
    this.key = html("div");
    this.table = html("div", { class: "scrolled", tabindex: 0, role: "group", "aria-label": "Memory as a table" });
    place.replaceChildren(this.bars, this.key, html("details", {}, html("summary", {}, "As a table"), this.table));
  }

  // `most` bytes are the width of the picture.
  draw(ranks, most = mostBytes(ranks)) {
    const kinds = MEMORY_KINDS.filter(([kind]) => ranks.some((rank) => rank.bytes[kind] > 0));
    const lines = ranks.flatMap((rank) => [
      html("span", { class: "rank-name" }, shortName(rank.name)),
      memoryBar(rank, most),
      html("span", { class: "figure" }, bytesText(totalBytes(rank))),
    ]);
    this.bars.replaceChildren(...lines);
    this.key.replaceChildren(memoryLegend(kinds));
    const hasReserved = ranks.some((rank) => rank.reserved_cache);
    const row = (rank) => [rank.name, ...kinds.map(([kind]) => bytesText(rank.bytes[kind] ?? 0)), bytesText(totalBytes(rank)), ...(hasReserved ? [bytesText(rank.reserved_cache)] : [])];
    const heads = ["rank", ...kinds.map(([, label]) => label), this.total, ...(hasReserved ? ["KV cache, reserved"] : [])];
    this.table.replaceChildren(tableOf(this.caption, heads, ranks.map(row)));
  }
}
