// Figures over time, drawn by uPlot (a script of its own, before this module). A chart takes
//   {times: [seconds since 1970], series: [[number or null, ...], ...]}

import { html, setText } from "./elements.js";

const CHART_PX = 110;
const SHORTEST_S = 60; // that the time axis shows

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

export class TimeChart {
  // `lines` name the series; `show` writes a value of the axis.
  constructor(place, title, lines, show, { least = 1, most = null } = {}) {
    this.title = title;
    this.lines = lines;
    this.show = show;
    this.least = least; // of the axis' upper end
    this.most = most;
    this.data = { times: [], series: lines.map(() => []) };
    this.values = lines.map(() => html("b", {}, "–"));
    const keys = lines.map((line, index) => html("li", {}, html("i", { class: `line-${index}`, "aria-hidden": "true" }), line, " ", this.values[index]));
    this.picture = html("div", { class: "chart", role: "img", "aria-label": title });
    place.replaceChildren(html("h3", {}, title), html("ul", { class: "legend" }, ...keys), this.picture);
    new ResizeObserver(() => this.resize()).observe(this.picture);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.build());
  }

  build() {
    this.plot?.destroy();
    const [ink, rule] = [colour("--soft"), colour("--rule")];
    const axis = { stroke: ink, grid: { stroke: rule, width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const options = {
      width: this.picture.clientWidth,
      height: CHART_PX,
      legend: { show: false },
      cursor: { show: false },
      scales: {
        x: { range: (_, first, last) => [Math.min(first, last - SHORTEST_S), last] },
        y: { range: (_, __, most) => [0, this.most ?? Math.max(most * 1.1, this.least)] },
      },
      axes: [
        { ...axis, size: 22, space: 60, values: (_, ticks) => ticks.map((at) => new Date(at * 1e3).toLocaleTimeString([], { minute: "2-digit", second: "2-digit" })) },
        { ...axis, size: 54, space: 28, gap: 4, values: (_, ticks) => ticks.map((it) => this.show(it)) },
      ],
      series: [{}, ...this.lines.map((_, index) => ({ stroke: colour(`--line-${index}`), width: 1.5, points: { show: false } }))],
    };
    this.plot = new globalThis.uPlot(options, [this.data.times, ...this.data.series], this.picture);
  }

  resize() {
    if (!this.picture.clientWidth) return;
    if (!this.plot) this.build();
    else this.plot.setSize({ width: this.picture.clientWidth, height: CHART_PX });
  }

  // The lines stay: they tell when they were so.
  lose() {
    for (const value of this.values) setText(value, "–");
    this.picture.setAttribute("aria-label", `${this.title}: not known now`);
  }

  draw(data) {
    this.data = data;
    const last = data.series.map((values) => values.at(-1) ?? null);
    last.forEach((value, index) => setText(this.values[index], value === null ? "–" : this.show(value)));
    const told = this.lines.map((line, index) => `${line} ${this.values[index].textContent}`).join(", ");
    this.picture.setAttribute("aria-label", `${this.title}: now ${told}`);
    this.plot?.setData([data.times, ...data.series]);
  }
}
