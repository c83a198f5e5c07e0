// Throughput and latency by a size that was chosen, as bars and as a table. Takes
//   [{size, output_tokens_per_s, total_tokens_per_s, ttft_s, itl_s, e2e_s}], from small to large.

import { durationText, html, numberText, svg, tableOf } from "./elements.js";

function rateBar(rate, most) {
  return svg("svg", { class: "ledger-bar", width: "100%", height: 16, "aria-hidden": "true" }, svg("rect", { width: `${(100 * rate) / most}%`, height: "100%", class: "row-compute" }));
}

function median(spread) {
  return "p50" in spread ? durationText(spread.p50) : "–";
}

export class ThroughputView {
  constructor(place) {
    this.bars = html("div", { class: "ledger-bars" });
    this.table = html("div", { class: "scrolled", tabindex: 0, role: "group", "aria-label": "Throughput by size as a table" });
    place.replaceChildren(this.bars, html("p", { class: "note" }, "Tokens a second, of prompts and answers."), this.table);
  }

  draw(passes) {
    const most = Math.max(1e-9, ...passes.map((it) => it.total_tokens_per_s));
    const lines = passes.flatMap((it) => [
      html("span", { class: "rank-name" }, String(it.size)),
      rateBar(it.total_tokens_per_s, most),
      html("span", { class: "figure" }, numberText(it.total_tokens_per_s)),
    ]);
    this.bars.replaceChildren(...lines);
    const rows = passes.map((it) => [String(it.size), numberText(it.output_tokens_per_s), median(it.ttft_s), median(it.itl_s), median(it.e2e_s)]);
    this.table.replaceChildren(tableOf("Of answers; medians", ["size", "tokens/s", "first token", "between tokens", "end to end"], rows));
  }
}
