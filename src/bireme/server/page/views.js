// All that is drawn of a moment. What a server does not have (a vision model's KV cache) is left out.

import { TimeChart } from "./charts.js";
import { durationText, html, numberText, setText, shareText } from "./elements.js";
import { GanttView } from "./gantt.js";
import { History } from "./history.js";
import { LedgerView } from "./ledger.js";
import { MemoryView } from "./memory.js";
import { RanksView } from "./ranks.js";

const at = (id) => document.getElementById(id);
const PERCENTILES = ["p50", "p90", "p99"];
const OLD_S = 2; // then it is said how old the last steps are
const LATENCY = { least: 1e-3 };

// Title, lines, names in the history, how a value is written, options.
const CHARTS = [
  ["Tokens a second", ["generated", "prompt"], ["generated", "prompt"], numberText],
  ["Images a second", ["images"], ["images"], numberText],
  ["Running and waiting", ["running", "waiting"], ["running", "waiting"], numberText],
  ["KV cache in use", ["blocks"], ["cache"], shareText, { most: 1 }],
  ["Time to first token (TTFT), last 60 s", PERCENTILES, ["ttft50", "ttft90", "ttft99"], durationText, LATENCY],
  ["Between tokens (ITL), last 60 s", PERCENTILES, ["itl50", "itl90", "itl99"], durationText, LATENCY],
  ["End to end, last 60 s", PERCENTILES, ["e2e50", "e2e90", "e2e99"], durationText, LATENCY],
];
const FIGURES = [
  ["tokens/s", "generated", numberText],
  ["images/s", "images", numberText],
  ["running", "running", numberText],
  ["waiting", "waiting", numberText],
  ["KV cache", "cache", shareText],
  ["TTFT p50", "ttft50", durationText],
  ["TTFT p99", "ttft99", durationText],
  ["ITL p50", "itl50", durationText],
  ["ITL p99", "itl99", durationText],
];

// The names that this server has anything of.
function namesOf(moment) {
  const { counts, stats } = moment;
  const found = new Set(["running", "waiting", "e2e50"]);
  if ("generation_tokens_total" in counts.counters) for (const name of ["generated", "cache", "ttft50", "ttft99", "itl50", "itl99"]) found.add(name);
  if (stats && "num_images_total" in stats) found.add("images");
  return found;
}

export class Views {
  constructor() {
    this.clear();
  }

  // As if nothing had been shown.
  clear() {
    this.history = new History();
    for (const id of ["figures", "ranks", "ledger", "gantt", "gantt-tools", "charts", "memory"]) at(id).replaceChildren();
    this.ranks = new RanksView(at("ranks"));
    this.ledger = new LedgerView(at("ledger"));
    this.gantt = new GanttView(at("gantt"));
    at("gantt-tools").replaceChildren(this.gantt.tools);
    this.lastTime = null;
    this.lastStep = null; // that is drawn
    [this.figures, this.charts] = [[], []];
    this.memory = new MemoryView(at("memory"), { caption: "Bytes that each rank may come to hold, as planned", total: "planned in all" });
    this.known = "";
  }

  draw(moment) {
    this.history.add(moment);
    this.lastTime = moment.time_s;
    const names = namesOf(moment);
    const known = [...names].join();
    if (known !== this.known) this.build(names);
    this.known = known;
    const now = this.history.points.at(-1).values;
    for (const [element, name, show] of this.figures) setText(element, now[name] === null ? "–" : show(now[name]));
    for (const [chart, lines] of this.charts) chart.draw(this.history.series(lines));
    this.ranks.draw(moment, this.history);
    if (moment.ledger) {
      this.ledger.draw(moment.ledger);
      this.drawGantt(moment);
    }
    if (moment.stats?.ranks.length) this.memory.draw(moment.stats.ranks.map((rank, index) => memoryOf(moment.server.ranks[index].name, rank)));
  }

  // The last steps stay, with how long ago they were, until there are others.
  drawGantt({ time_s: now, ledger, server }) {
    const { gantt, until_s: untilS } = ledger;
    const last = lastStepOf(gantt);
    const name = last && `${server.created}: ${last.step}`;
    if (last && name !== this.lastStep) this.stepsUntil = now - untilS - gantt.seconds + last.end_s;
    if (!this.lastStep || (last && name !== this.lastStep)) this.gantt.draw(last ? withoutRest(gantt) : gantt);
    this.lastStep = name ?? this.lastStep;
    const age = this.lastStep ? now - this.stepsUntil : 0;
    this.gantt.setAge(age >= OLD_S ? `, ${Math.round(age)} s ago` : "");
  }

  // Nothing is known any more of what is now; charts and the last ledger tell of a time that they name.
  lose() {
    for (const [element] of this.figures) setText(element, "–");
    for (const [chart] of this.charts) chart.lose();
    this.ranks.lose();
  }

  build(names) {
    this.figures = [];
    const tiles = FIGURES.filter(([, name]) => names.has(name)).map(([label, name, show]) => {
      const value = html("dd", {}, "–");
      this.figures.push([value, name, show]);
      return html("dl", {}, html("dt", {}, label), value);
    });
    at("figures").replaceChildren(...tiles);
    this.charts = [];
    const places = CHARTS.filter(([, , [name]]) => names.has(name)).map(([title, labels, lines, show, options]) => {
      const place = html("div");
      this.charts.push([new TimeChart(place, title, labels, show, options), lines]);
      return place;
    });
    at("charts").replaceChildren(...places);
  }
}

// And when in the window it ended; null where there was none.
function lastStepOf({ ranks }) {
  const lasts = ranks.map(({ bars }) => bars.findLast(([, , , step]) => step !== null)).filter(Boolean);
  const last = lasts.reduce((one, other) => (other[1] > one[1] ? other : one), lasts[0]);
  return last ? { step: last[3], end_s: last[1] / 1e6 } : null;
}

// Up to when there was no request any more.
function withoutRest(gantt) {
  const lasts = gantt.ranks.map(({ bars }) => bars.at(-1));
  if (!lasts.every((bar) => bar?.[2] === "starved")) return gantt;
  const end = Math.max(...lasts.map(([start]) => start));
  const ranks = gantt.ranks.map((rank) => ({ ...rank, bars: rank.bars.filter(([start]) => start < end) }));
  return { ...gantt, seconds: end / 1e6, ranks };
}

function memoryOf(name, { memory }) {
  return { name, bytes: { weights: memory.weight_bytes, kv: memory.cache_bytes, steps: memory.step_bytes } };
}
