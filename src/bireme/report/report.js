// Draws each run of the report; what a run is: RunData of report/data.py.

import { durationText, html, shortName, tableOf } from "./elements.js";
import { GanttView } from "./gantt.js";
import { LedgerView } from "./ledger.js";
import { MemoryView, mostBytes } from "./memory.js";
import { hatches } from "./rows.js";
import { messagesTable, mostSeconds, SizesView } from "./sizes.js";
import { mostTokens, ThroughputView } from "./throughput.js";

const ANSWERS = { tokens: "of answers" };
const ALL_TOKENS = { tokens: "of prompts and answers" };
const HELD = { caption: "Bytes that each rank held at most, as measured", total: "held in all" };

// A titled part of a run, and the place in it.
function card(title, ...tools) {
  const place = html("div");
  const heading = html("h2", {}, title);
  return [html("div", { class: "card" }, tools.length ? html("div", { class: "head" }, heading, ...tools) : heading, place), place];
}

function drawn(title, View, data, options = {}, most = undefined) {
  const [part, place] = card(title);
  new View(place, options).draw(data, most);
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

// Measured, and under it what a plan predicted, if there was one, on one scale of time, which all runs share.
function gantt(data, plan, scales) {
  const [place, below] = [html("div"), html("div")];
  const view = new GanttView(place, "The run");
  const [part, inside] = card("The run, rank by rank", view.tools);
  inside.replaceWith(place);
  const { seconds } = scales;
  scales.view?.join(view);
  scales.view ??= view;
  requestAnimationFrame(() => view.draw(data, seconds));
  if (plan) {
    const predicted = new GanttView(below, "The run as the plan predicted it");
    view.join(predicted);
    part.append(html("h3", {}, "As the plan predicted it: modelled"), below, html("p", { class: "note" }, plan.note), compared(plan.rows));
    requestAnimationFrame(() => predicted.draw(plan.gantt, seconds));
  }
  return part;
}

function compared(rows) {
  const heads = ["what", "predicted", "measured", "measured is"];
  return scrolled("Predicted and measured", tableOf("Predicted and measured", heads, rows));
}

function sweep(trials) {
  const [part, place] = card("By micro-batches");
  const heads = ["micro-batches", "one device", "stages", "predicted", "bubble", "of the schedule", "bubble predicted", "of the textbook"];
  const caption = "Images a second, and the share of time that a rank idles, as the mean of the ranks";
  place.append(scrolled("Sweep", tableOf(caption, heads, trials)));
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

function messages(found) {
  const [part, place] = card("Messages between stages");
  place.append(scrolled("Messages between stages", messagesTable(found)));
  return part;
}

function layout(ranks, parts) {
  const [part, place] = card("Layout");
  const rows = ranks.map((rank) => [shortName(rank.name), String(rank.stage), String(rank.tp_rank), rank.device, `${rank.layers[0]} to ${rank.layers[1] - 1}`]);
  place.append(scrolled("Layout", tableOf("Ranks and what they hold", ["rank", "stage", "tp", "device", parts], rows)));
  return part;
}

function about(facts, notes) {
  const [part, place] = card("What ran");
  place.append(terms("facts", facts), ...notes.map((note) => html("p", { class: "note" }, note)));
  return part;
}

// What the widths of pictures stand for, so that runs can be compared.
function scalesOf(runs) {
  const most = (values) => Math.max(1e-9, ...values);
  return {
    seconds: most(runs.flatMap(({ gantt, plan }) => [gantt.seconds, plan ? plan.gantt.seconds : 0])),
    bytes: most(runs.map((run) => mostBytes(run.memory))),
    collectives: most(runs.map((run) => mostSeconds(run.collectives))),
    batches: most(runs.map((run) => mostTokens(run.batches))),
    chunks: most(runs.map((run) => mostTokens(run.chunks))),
  };
}

function draw(run, scales) {
  return html(
    "article",
    { class: "run", "aria-label": run.name },
    html("header", {}, html("h1", {}, run.title), html("p", {}, run.name)),
    terms("figures", run.figures),
    findings(run.findings),
    gantt(run.gantt, run.plan, scales),
    drawn("Where the time went", LedgerView, run.ledger),
    run.trials.length ? sweep(run.trials) : "",
    html("div", { class: "pair" }, Object.keys(run.latency_s).length ? latencies(run.latency_s) : "", layout(run.ranks, run.parts)),
    run.collectives.length ? drawn("Collectives by size", SizesView, run.collectives, {}, scales.collectives) : "",
    run.messages.length ? messages(run.messages) : "",
    run.batches.length ? drawn("Throughput by batch", ThroughputView, run.batches, ANSWERS, scales.batches) : "",
    run.chunks.length ? drawn("Throughput by tokens a step", ThroughputView, run.chunks, ALL_TOKENS, scales.chunks) : "",
    drawn("Memory", MemoryView, run.memory, HELD, scales.bytes),
    about(run.facts, run.notes),
  );
}

document.body.append(hatches());
const runs = JSON.parse(document.getElementById("runs").textContent);
const scales = scalesOf(runs);
document.getElementById("main").append(...runs.map((run) => draw(run, scales)));
