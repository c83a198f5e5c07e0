// The rows of the bubble ledger (docs/metrics.md), in the order in which they are drawn: work is one colour,
// a bubble is hatched by its cause. Whoever draws puts `hatches()` into the document once.

import { html, svg } from "./elements.js";

export const ROWS = [
  { name: "compute", label: "compute" },
  { name: "collective_move", label: "collective" },
  { name: "collective_wait", label: "wait for the group" },
  { name: "transfer", label: "transfer" },
  { name: "fill_drain", label: "fill, drain", hatch: "M-2,2 l4,-4 M0,8 l8,-8 M6,10 l4,-4" },
  { name: "imbalance", label: "imbalance", hatch: "M-2,6 l4,4 M0,0 l8,8 M6,-2 l4,4" },
  { name: "token_dependency", label: "token dependency", hatch: "M0,0 l8,8 M0,8 l8,-8" },
  { name: "host", label: "host", hatch: "M2,0 v8 M6,0 v8" },
  { name: "starved", label: "no request", hatch: "M1,2 h2 M5,6 h2" },
  { name: "unattributed", label: "unattributed", hatch: "M0,2 h8 M0,6 h8" },
];

const HATCHED = new Set(ROWS.filter((row) => row.hatch).map((row) => row.name));

// Attributes of a rectangle of this row.
export function rowLook(name) {
  return HATCHED.has(name) ? { class: "bubble", fill: `url(#hatch-${name})` } : { class: `row-${name}` };
}

export function hatches() {
  const patterns = ROWS.filter((row) => row.hatch).map((row) =>
    svg(
      "pattern",
      { id: `hatch-${row.name}`, class: `hatch hatch-${row.name}`, width: 8, height: 8, patternUnits: "userSpaceOnUse" },
      svg("rect", { width: 8, height: 8 }),
      svg("path", { d: row.hatch }),
    ),
  );
  return svg("svg", { class: "hatches", width: 0, height: 0, "aria-hidden": "true" }, svg("defs", {}, ...patterns));
}

// One entry a row that is named; compute is coloured by step in a Gantt chart.
export function legend(names, { isByStep = false } = {}) {
  const swatch = (row) => {
    const size = { width: 14, height: 10, "aria-hidden": "true" };
    if (row.name !== "compute" || !isByStep) return svg("svg", size, svg("rect", { width: 14, height: 10, ...rowLook(row.name) }));
    const parts = [0, 1, 2].map((step) => svg("rect", { x: step * 5, width: 4, height: 10, class: `step-${step}` }));
    return svg("svg", size, ...parts);
  };
  const label = (row) => (row.name === "compute" && isByStep ? "compute, by step" : row.label);
  const shown = ROWS.filter((row) => names.has(row.name));
  return html("ul", { class: "legend" }, ...shown.map((row) => html("li", {}, swatch(row), label(row))));
}
