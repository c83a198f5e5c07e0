// Throughput and latency by a size that was chosen, as bars and as a table. Takes
//   [{size, is_own, tokens_per_s, ttft_s, itl_s, e2e_s}], from small to large; `is_own` is the run itself.

import { durationText, html, numberText, svg, tableOf } from "./elements.js";

function rateBar(rate, most) {
  return svg("svg", { class: "ledger-bar", width: "100%", height: 16, "aria-hidden": "true" }, svg("rect", { width: `${(100 * rate) / most}%`, height: "100%", class: "row-compute" }));
}

function median(spread) {
  return "p50" in spread ? durationText(spread.p50) : "–";
}

export function mostTokens(passes) {
  return Math.max(1e-9, ...passes.map((it) => it.tokens_per_s));
}

function sizeName(it) {
  return it.is_own ? `${it.size}, this run` : String(it.size);
}

// `tokens` says which are counted.
export class ThroughputView {
  constructor(place, { tokens }) {
    this.bars = html("div", { class: "ledger-bars" });
    this.table = html("div", { class: "scrolled", tabindex: 0, role: "group", "aria-label": "Throughput by size as a table" });
    place.replaceChildren(this.bars, html("p", { class: "note" }, `Tokens a second, ${tokens}; latencies are medians.`), this.table);
  }

  // `most` tokens a second are the width of the picture.
  draw(passes, most = mostTokens(passes)) {
    const lines = passes.flatMap((it) => [
      html("span", { class: "rank-name" }, sizeName(it)),
      rateBar(it.tokens_per_s, most),
      html("span", { class: "figure" }, numberText(it.tokens_per_s)),
    ]);
    this.bars.replaceChildren(...lines);
    const rows = passes.map((it) => [sizeName(it), numberText(it.tokens_per_s), median(it.ttft_s), median(it.itl_s), median(it.e2e_s)]);
    this.table.replaceChildren(tableOf("Throughput and latency by size", ["size", "tokens/s", "first token", "between tokens", "end to end"], rows));
  }
}
