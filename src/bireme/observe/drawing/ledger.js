// The bubble ledger as a stacked bar a rank, and as a table. Takes what /debug/ledger answers:
//   {seconds, until_s, ranks: [{name, stage, shares: {row: 0 to 1}, late: {rank: share}, ...}]}

import { html, percentText, setText, shortName, svg, tableOf } from "./elements.js";
import { legend, ROWS, rowLook } from "./rows.js";

// A bar of one rank's shares, as wide as its place.
export function ledgerBar(shares, height = 16) {
  let at = 0;
  const parts = [];
  for (const row of ROWS) {
    const share = Math.max(0, shares[row.name] ?? 0);
    if (share > 0.0005) {
      const place = { x: `${100 * at}%`, width: `${100 * share}%`, height: "100%" };
      parts.push(svg("rect", { ...place, ...rowLook(row.name) }, svg("title", {}, `${row.label} ${percentText(share)}`)));
    }
    at += share;
  }
  return svg("svg", { class: "ledger-bar", width: "100%", height, "aria-hidden": "true" }, ...parts);
}

export function shownRows(ledger, least = 0.0005) {
  return new Set(ROWS.map((row) => row.name).filter((name) => ledger.ranks.some((rank) => rank.shares[name] >= least)));
}

function ledgerTable(ledger) {
  const shown = ROWS.filter((row) => shownRows(ledger).has(row.name));
  const rows = ledger.ranks.map((rank) => [rank.name, ...shown.map((row) => percentText(rank.shares[row.name]))]);
  return tableOf("Share of each rank's time", ["rank", ...shown.map((row) => row.label)], rows);
}

function lateText(ledger) {
  const waits = ledger.ranks.flatMap((rank) => Object.entries(rank.late).map(([name, share]) => ({ of: rank.name, name, share })));
  const most = waits.reduce((best, it) => (it.share > best.share ? it : best), { share: 0.05 });
  return most.name ? `${shortName(most.of)} waited ${percentText(most.share)} of the time for ${shortName(most.name)}.` : "";
}

// Fills a place and keeps its table open or closed from one ledger to the next.
export class LedgerView {
  constructor(place) {
    this.bars = html("div", { class: "ledger-bars" });
    this.key = html("div");
    this.note = html("p", { class: "note" });
    this.table = html("div", { class: "scrolled", tabindex: 0, role: "group", "aria-label": "Ledger as a table" });
    this.details = html("details", {}, html("summary", {}, "As a table"), this.table);
    place.replaceChildren(this.bars, this.key, this.note, this.details);
  }

  draw(ledger) {
    const lines = ledger.ranks.flatMap((rank) => [
      html("span", { class: "rank-name" }, shortName(rank.name)),
      ledgerBar(rank.shares),
      html("span", { class: "figure" }, percentText(rank.shares.compute)),
    ]);
    this.bars.replaceChildren(...lines);
    this.key.replaceChildren(legend(shownRows(ledger)));
    const age = ledger.until_s >= 2 ? `, up to ${Math.round(ledger.until_s)} s ago` : "";
    setText(this.note, `Of ${ledger.seconds.toFixed(2)} s${age}; the figures are compute. ${lateText(ledger)}`);
    this.table.replaceChildren(ledgerTable(ledger));
  }
}
