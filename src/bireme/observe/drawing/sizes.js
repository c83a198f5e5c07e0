// Collectives by the bytes of their tensors: how long one takes, waiting and moving, and how often. Takes
//   [{kind, stage, num_bytes, count, time_s, move_s, median_s, median_move_s, median_skew_s, bytes_per_s, ceiling_bytes_per_s, ...}]

import { bytesText, durationText, html, numberText, percentText, svg, tableOf } from "./elements.js";

const NUM_SHOWN = 8; // that took most

function nameOf(size) {
  return `${size.kind.replace("_", "-")} ${bytesText(size.num_bytes)}`;
}

// What waiting and moving took of the one that took most.
function sizeBar(size, most) {
  const wait = Math.max(0, size.time_s - size.move_s);
  const part = (x, seconds, row, label) =>
    svg("rect", { x: `${(100 * x) / most}%`, width: `${(100 * seconds) / most}%`, height: "100%", class: `row-${row}` }, svg("title", {}, `${label} ${durationText(seconds)}`));
  return svg("svg", { class: "ledger-bar", width: "100%", height: 16, "aria-hidden": "true" }, part(0, size.move_s, "collective_move", "moving"), part(size.move_s, wait, "collective_wait", "waiting"));
}

function rateText(rate) {
  return rate === null || rate === undefined ? "–" : `${bytesText(rate)}/s`;
}

function rowOf(size) {
  const share = size.bytes_per_s && size.ceiling_bytes_per_s ? percentText(size.bytes_per_s / size.ceiling_bytes_per_s) : "–";
  return [nameOf(size), String(size.stage), numberText(size.count), durationText(size.median_s), durationText(size.median_move_s), durationText(size.median_skew_s), rateText(size.bytes_per_s), share];
}

export function mostSeconds(sizes) {
  return Math.max(1e-9, ...sizes.map((size) => size.time_s));
}

function messageRow(it) {
  const share = it.bytes_per_s && it.ceiling_bytes_per_s ? percentText(it.bytes_per_s / it.ceiling_bytes_per_s) : "–";
  return [`stage ${it.src_stage} to ${it.dst_stage}`, bytesText(it.num_bytes), numberText(it.count), durationText(it.time_s), durationText(it.median_s), rateText(it.bytes_per_s), share];
}

// Messages of one size from stage to stage: [{src_stage, dst_stage, num_bytes, count, time_s, median_s, ...}]
export function messagesTable(messages) {
  const heads = ["message", "size", "times", "summed", "one takes", "rate", "of the ceiling"];
  return tableOf("Messages between stages; one takes: the median", heads, messages.map(messageRow));
}

export class SizesView {
  constructor(place) {
    this.bars = html("div", { class: "ledger-bars" });
    this.note = html("p", { class: "note" });
    this.table = html("div", { class: "scrolled", tabindex: 0, role: "group", "aria-label": "Collectives as a table" });
    place.replaceChildren(this.bars, this.note, html("details", {}, html("summary", {}, "As a table"), this.table));
  }

  // `most` seconds are the width of the picture.
  draw(sizes, most = mostSeconds(sizes)) {
    const shown = [...sizes].sort((a, b) => b.time_s - a.time_s).slice(0, NUM_SHOWN);
    const lines = shown.flatMap((size) => [
      html("span", { class: "rank-name" }, nameOf(size)),
      sizeBar(size, most),
      html("span", { class: "figure" }, durationText(size.time_s)),
    ]);
    this.bars.replaceChildren(...lines);
    this.note.textContent = `Summed over the run: moving, and behind it waiting for the last rank. ${sizes.some((size) => size.is_sampled) ? "Sampled: of the steps that were marked." : ""}`;
    const heads = ["collective", "stage", "times", "one takes", "moving", "apart", "rate", "of the ceiling"];
    this.table.replaceChildren(tableOf("Collectives by size; medians", heads, sizes.map(rowOf)));
  }
}
