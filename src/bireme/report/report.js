// Draws each run of the report; what a run is: RunData of report/data.py.

import { durationText, html, shortName, tableOf } from "./elements.js";
import { GanttView } from "./gantt.js";
import { LedgerView } from "./ledger.js";
import { MemoryView } from "./memory.js";
import { hatches } from "./rows.js";
import { SizesView } from "./sizes.js";
import { ThroughputView } from "./throughput.js";

// A titled part of a run, and the place in it.
function card(title, ...tools) {
  const place = html("div");
  const heading = html("h2", {}, title);
  return [html("div", { class: "card" }, tools.length ? html("div", { class: "head" }, heading, ...tools) : heading, place), place];
}

function drawn(title, View, data) {
  const [part, place] = card(title);
  new View(place).draw(data);
  return part;
}

function terms(kind, pairs) {
  return html("dl", { class: kind }, ...pairs.map(([what, value]) => html("div", {}, html("dt", {}, what), html("dd", {}, value))));
}

function findings(found) {
  const [part, place] = card("What the doctor finds");
  const item = (it) => html("li", {}, html("b", {}, `${it.title} (${it.rule})`), html("p", {}, it.figure), html("p", {}, it.remedy));
  place.append(found.length ? html("ol", { class: "findings" }, ...found.map(item)) : html("p", { class: "healthy" }, "Nothing."));
  place.append(html("p", { class: "note" }, "Of the run alone: bireme doctor reads the checkpoint's files too."));
  return part;
}

function gantt(data) {
  const place = html("div");
  const view = new GanttView(place, "The run");
  const [part, inside] = card("The run, rank by rank", view.tools);
  inside.replaceWith(place);
  requestAnimationFrame(() => view.draw(data));
  return part;
}

function scrolled(label, table) {
  return html("div", { class: "scrolled", tabindex: 0, role: "group", "aria-label": label }, table);
}

function latencies(spreads) {
  const [part, place] = card("Latencies");
  const names = ["mean", "p50", "p90", "p99"];
  const rows = Object.entries(spreads).map(([what, spread]) => [what, ...names.map((name) => (name in spread ? durationText(spread[name]) : "–"))]);
  place.append(scrolled("Latencies", tableOf("Of all requests, in the measured pass", ["from arrival", ...names], rows)));
  return part;
}

function layout(ranks) {
  const [part, place] = card("Layout");
  const rows = ranks.map((rank) => [shortName(rank.name), String(rank.stage), String(rank.tp_rank), rank.device, `${rank.layers[0]} to ${rank.layers[1] - 1}`]);
  place.append(scrolled("Layout", tableOf("Ranks and what they hold", ["rank", "stage", "tp", "device", "layers"], rows)));
  return part;
}

function about(facts, notes) {
  const [part, place] = card("What ran");
  place.append(terms("facts", facts), ...notes.map((note) => html("p", { class: "note" }, note)));
  return part;
}

function draw(run) {
  return html(
    "article",
    { class: "run", "aria-label": run.name },
    html("header", {}, html("h1", {}, run.title), html("p", {}, run.name)),
    terms("figures", run.figures),
    findings(run.findings),
    gantt(run.gantt),
    drawn("Where the time went", LedgerView, run.ledger),
    html("div", { class: "pair" }, latencies(run.latency_s), layout(run.ranks)),
    run.collectives.length ? drawn("Collectives by size", SizesView, run.collectives) : "",
    run.batches.length ? drawn("Throughput by batch", ThroughputView, run.batches) : "",
    run.chunks.length ? drawn("Throughput by tokens a step", ThroughputView, run.chunks) : "",
    drawn("Memory", MemoryView, run.memory),
    about(run.facts, run.notes),
  );
}

document.body.append(hatches());
const runs = JSON.parse(document.getElementById("runs").textContent);
document.getElementById("main").append(...runs.map(draw));
