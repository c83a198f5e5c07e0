// What each rank did when: a line a rank, compute coloured by step, bubbles hatched by cause. Takes
//   {seconds, num_steps, ranks: [{name, stage, bars: [[start_us, end_us, row, step or null], ...]}]}
// whose bars lie in [0, seconds), in their order, without overlap, and what Gantt of observe/gantt.py has beside
// these. Where there is no room for each bar, columns are filled by rows' shares of their time, compute lowest.
// Zoom: buttons, keys, the wheel, dragging.

import { durationText, html, percentText, roundTicks, setText, shortName, svg, tickText } from "./elements.js";
import { legend, ROWS, rowLook } from "./rows.js";

const NUM_STEP_COLOURS = 6;
const LEAST_PX = 1.5; // of a bar; narrower ones are drawn by their shares of time
const LEAST_US = 100; // that can be looked at
const NUM_LAST = 12; // steps
const LINE_PX = 24;
const BAR_PX = 19;
const INSET_PX = 6; // of what is in a step and no compute
const AXIS_PX = 20;
const ROW_LABELS = new Map(ROWS.map((row) => [row.name, row.label]));

// Of sorted bars, the first that ends behind a time.
function firstBehind(bars, time) {
  let [low, high] = [0, bars.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (bars[middle][1] <= time) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Bars in [from, to): each [start, end, row, step or null], or, of bars shorter than `leastAt(start)` behind one
// another, a mix of about that length: {start, end, rows: Map(row -> {length, step})}.
function* drawable(bars, from, to, leastAt) {
  let mix = null;
  for (let index = firstBehind(bars, from); index < bars.length && bars[index][0] < to; index += 1) {
    const bar = bars[index];
    const least = leastAt(bar[0]);
    const isLong = bar[1] - bar[0] >= least;
    if (mix && (isLong || bar[0] >= mix.start + least)) {
      yield mix;
      mix = null;
    }
    if (isLong) yield bar;
    else {
      mix ??= { start: bar[0], end: bar[0], rows: new Map() };
      addBar(mix, bar);
    }
  }
  if (mix) yield mix;
}

function addBar(mix, [start, end, row, step]) {
  const known = mix.rows.get(row) ?? { length: 0, step };
  mix.rows.set(row, { length: known.length + end - start, step: known.step === step ? step : null });
  mix.end = end;
}

// Attributes of a bar of a step, or of none that is known.
function barLook(row, step) {
  if (step === null) return rowLook(row);
  return { class: `step-${step % NUM_STEP_COLOURS}${row === "compute" ? "" : " beside"}` };
}

export class GanttView {
  constructor(place, name = "Last steps") {
    this.data = null;
    this.view = [0, 1]; // what is shown of the window, as shares of it
    this.together = [this]; // those that show the same part
    const button = (label, text, act) => {
      const made = html("button", { type: "button", "aria-label": label, title: label }, text);
      made.addEventListener("click", act);
      return made;
    };
    this.bar = html(
      "div",
      { class: "tools", role: "group", "aria-label": "Zoom" },
      button("Earlier", "←", () => this.move(-0.25)),
      button("Later", "→", () => this.move(0.25)),
      button("Zoom in", "+", () => this.zoom(0.5)),
      button("Zoom out", "−", () => this.zoom(2)),
      button("Show all", "All", () => this.look(0, 1)),
    );
    this.lastSteps = button("Show the last steps", "Last steps", () => this.lookAtLast());
    this.label = name;
    this.summary = "";
    this.age = "";
    this.picture = svg("svg", { class: "gantt", width: "100%", tabindex: 0, role: "img", "aria-label": name });
    this.told = html("p", { class: "note readout" });
    this.key = html("div");
    place.replaceChildren(this.picture, this.told, this.key);
    this.listen();
  }

  // Their home is the caller's: beside a heading, or under the picture.
  get tools() {
    return this.bar;
  }

  // Another of the same window shows what this one shows from now on, whichever is moved.
  join(other) {
    const all = [...this.together, other];
    for (const it of all) it.together = all;
  }

  listen() {
    const keys = { ArrowLeft: () => this.move(-0.25), ArrowRight: () => this.move(0.25), "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2), 0: () => this.look(0, 1), Home: () => this.look(0, 1) };
    this.picture.addEventListener("keydown", (event) => {
      const act = event.ctrlKey || event.metaKey || event.altKey ? undefined : keys[event.key];
      if (!act) return;
      event.preventDefault();
      act();
    });
    // Without focus the wheel is the page's, to scroll with.
    const wheel = (event) => {
      if (!event.ctrlKey && document.activeElement !== this.picture) return;
      event.preventDefault();
      this.zoom(event.deltaY > 0 ? 1.25 : 0.8, this.shareAt(event));
    };
    this.picture.addEventListener("wheel", wheel, { passive: false });
    this.picture.addEventListener("pointermove", (event) => this.onMove(event));
    this.picture.addEventListener("pointerleave", () => this.summarise());
    new ResizeObserver(() => this.render()).observe(this.picture);
  }

  // The time under a pointer, as a share of the window.
  shareAt(event) {
    const place = this.picture.getBoundingClientRect();
    const [from, to] = this.view;
    const inside = (event.clientX - place.left - this.left) / Math.max(1, place.width - this.left);
    return from + Math.min(1, Math.max(0, inside)) * (to - from);
  }

  onMove(event) {
    if (!this.data) return;
    if (event.buttons & 1) {
      const [from, to] = this.view;
      const width = Math.max(1, this.picture.clientWidth - this.left);
      this.move(-event.movementX / width, to - from);
    }
    const place = this.picture.getBoundingClientRect();
    const rank = this.data.ranks[Math.floor((event.clientY - place.top) / LINE_PX)];
    const time = this.shareAt(event) * this.seconds * 1e6;
    if (rank && time < this.data.whole_us) return setText(this.told, this.columnText(rank, time));
    const found = rank?.bars[firstBehind(rank.bars, time)];
    if (!found || found[0] > time) return this.summarise();
    const [start, end, row, step] = found;
    const what = step === null ? ROW_LABELS.get(row) : `${ROW_LABELS.get(row)}, step ${step}`;
    setText(this.told, `${rank.name}: ${what}, ${durationText((end - start) / 1e6)} from ${durationText(start / 1e6)} on`);
  }

  // Of the column at a time before bars are whole.
  columnText(rank, time) {
    const start = time - (time % this.data.column_us);
    const end = Math.min(start + this.data.column_us, this.data.whole_us);
    const shares = new Map();
    for (let index = firstBehind(rank.bars, start); index < rank.bars.length && rank.bars[index][0] < end; index += 1) {
      const [from, to, row] = rank.bars[index];
      shares.set(row, (shares.get(row) ?? 0) + (Math.min(to, end) - Math.max(from, start)) / (end - start));
    }
    const told = [...shares].map(([row, share]) => `${ROW_LABELS.get(row)} ${percentText(share)}`);
    return `${rank.name}: ${told.join(", ")} of ${durationText((end - start) / 1e6)} from ${durationText(start / 1e6)} on`;
  }

  zoom(factor, about = (this.view[0] + this.view[1]) / 2) {
    const [from, to] = this.view;
    const width = Math.min(1, Math.max(LEAST_US / 1e6 / this.seconds, (to - from) * factor));
    const start = about - ((about - from) / (to - from)) * width;
    this.look(start, start + width);
  }

  move(share) {
    const width = this.view[1] - this.view[0];
    this.look(this.view[0] + share * width, this.view[1] + share * width);
  }

  look(from, to) {
    const width = Math.min(1, to - from);
    const start = Math.min(1 - width, Math.max(0, from));
    for (const it of this.together) {
      it.view = [start, start + width];
      it.render();
    }
  }

  lookAtLast() {
    const end = this.data.seconds / this.seconds;
    this.look(end * (1 - NUM_LAST / this.numSteps), end);
  }

  // `seconds` are those of the picture, where that is to show more than the data.
  draw(data, seconds = data.seconds) {
    this.data = data;
    this.seconds = seconds;
    this.rows = new Set(data.ranks.flatMap((rank) => rank.bars.map((bar) => bar[2])));
    this.numSteps = data.num_steps;
    const hasLast = this.numSteps > 1.5 * NUM_LAST;
    if (hasLast !== this.lastSteps.isConnected) hasLast ? this.bar.append(this.lastSteps) : this.lastSteps.remove();
    this.summary = `${data.num_steps} steps of ${data.ranks.length} ranks in ${durationText(data.seconds)}`;
    if (data.column_us) this.summary += `; the first ${durationText(data.whole_us / 1e6)} as shares of each ${durationText(data.column_us / 1e6)}`;
    this.describe();
    this.key.replaceChildren(legend(this.rows, { isByStep: true }));
    this.render();
    this.summarise();
  }

  // A text behind what is said of the data, such as how old they are.
  setAge(text) {
    if (text === this.age) return;
    this.age = text;
    this.describe();
    this.summarise();
  }

  describe() {
    this.picture.setAttribute("aria-label", `${this.label}: ${this.summary}${this.age}. Plus and minus zoom, arrows move.`);
  }

  // Where a pointer is over no bar; called as often as it moves.
  summarise() {
    setText(this.told, this.summary + this.age);
  }

  render() {
    const width = this.picture.clientWidth;
    if (!this.data || !width) return;
    const { ranks } = this.data;
    this.left = width < 500 ? 22 : 54;
    const [from, to] = this.view.map((share) => share * this.seconds * 1e6);
    const scale = (width - this.left) / (to - from); // pixels a microsecond
    const height = ranks.length * LINE_PX + AXIS_PX;
    this.picture.setAttribute("height", height);
    const inside = svg("svg", { x: this.left, width: width - this.left, height });
    const labels = ranks.map((rank, index) =>
      svg("text", { class: "rank-name", x: 0, y: index * LINE_PX + 14 }, this.left < 50 ? String(index) : shortName(rank.name)),
    );
    const ticks = roundTicks(from, to, Math.max(2, (width - this.left) / 110));
    for (const at of ticks) {
      const x = (at - from) * scale;
      inside.append(
        svg("line", { class: "tick", x1: x, x2: x, y1: 0, y2: height - AXIS_PX + 4 }),
        x < width - this.left - 48 ? svg("text", { class: "axis", x: x + 3, y: height - 5 }, tickText(at, ticks[1] - ticks[0])) : "",
      );
    }
    ranks.forEach((rank, index) => this.renderRank(inside, rank, index * LINE_PX, from, to, scale));
    this.picture.replaceChildren(...labels, inside);
  }

  renderRank(inside, rank, y, from, to, scale) {
    const { whole_us: wholeUs, column_us: columnUs } = this.data;
    const least = LEAST_PX / scale;
    const leastAt = (time) => (time < wholeUs ? Math.max(least, columnUs) : least);
    const mixed = new Map(); // one path a row and step, however many columns
    for (const it of drawable(rank.bars, from, to, leastAt)) {
      if (it.rows) this.addMix(mixed, it, y, from, scale);
      else this.renderBar(inside, it, y, from, scale);
    }
    for (const [look, path] of mixed.values()) inside.append(svg("path", { d: path.join(""), ...look }));
  }

  renderBar(inside, [start, end, row, step], y, from, scale) {
    const x = (start - from) * scale;
    const width = (end - start) * scale;
    inside.append(svg("rect", { x, y, width, height: BAR_PX, ...barLook(row, step) }));
    if (step !== null && row !== "compute") inside.append(svg("rect", { x, y: y + INSET_PX, width, height: BAR_PX - 2 * INSET_PX, ...rowLook(row) }));
    const label = String(step);
    if (step !== null && row === "compute" && width > 7 * label.length + 6) {
      inside.append(svg("text", { class: "step-name", x: Math.max(x, 0) + 4, y: y + 13.5 }, label));
    }
  }

  addMix(mixed, { start, end, rows }, y, from, scale) {
    const [x, width] = [(start - from) * scale, Math.max(0.5, (end - start) * scale)];
    let bottom = y + BAR_PX;
    for (const { name } of ROWS.filter((row) => rows.has(row.name))) {
      const { length, step } = rows.get(name);
      const height = (BAR_PX * length) / (end - start);
      bottom -= height;
      const look = name === "compute" ? barLook(name, step) : rowLook(name);
      const key = Object.values(look).join();
      if (!mixed.has(key)) mixed.set(key, [look, []]);
      mixed.get(key)[1].push(`M${x.toFixed(2)} ${bottom.toFixed(2)}h${width.toFixed(2)}v${height.toFixed(2)}h${-width.toFixed(2)}z`);
    }
  }
}
