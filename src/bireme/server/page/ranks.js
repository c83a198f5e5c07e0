// The topology: stages as columns, their ranks as boxes with what each is at.

import { html, numberText, setText, shortName } from "./elements.js";
import { ledgerBar } from "./ledger.js";

const STUCK_S = 2;

class RankBox {
  constructor(rank) {
    this.rank = rank;
    this.state = html("span", { class: "state" });
    this.bar = html("div");
    const name = html("p", {}, html("b", {}, shortName(rank.name)), html("span", { class: "state" }, `tp ${rank.tp_rank} · ${rank.device}`));
    this.element = html("li", { class: "rank" }, name, this.bar, html("p", {}, this.state));
    this.steps = null;
    this.changed = null; // when it last made a step, or nobody asked
  }

  draw(moment, stats, shares) {
    const isAsked = moment.stats?.num_running > 0;
    if (!isAsked || this.steps !== (stats?.num_steps_total ?? null)) this.changed = moment.time_s;
    const rate = stats && this.steps !== null ? (stats.num_steps_total - this.steps) / (moment.time_s - this.time) : 0;
    [this.steps, this.time] = [stats?.num_steps_total ?? null, moment.time_s];
    const [is, text] = this.told(moment, stats, rate, isAsked);
    this.element.dataset.is = is;
    setText(this.state, text);
    if (shares) this.bar.replaceChildren(ledgerBar(shares, 8));
  }

  lose() {
    this.element.dataset.is = "gone";
    setText(this.state, "unknown");
  }

  told(moment, stats, rate, isAsked) {
    if (moment.failed_rank === this.rank.name) return ["failed", "failed"];
    if (!stats) return ["gone", "not answering"];
    if (rate > 0) return ["working", `${numberText(rate)} steps/s`];
    const still = moment.time_s - this.changed;
    if (still > STUCK_S) return ["stuck", `no step for ${Math.round(still)} s`];
    return isAsked ? ["working", "in a step"] : ["idle", "idle"];
  }
}

export class RanksView {
  constructor(place) {
    this.place = place;
    this.known = "";
    [this.boxes, this.edges] = [[], []];
  }

  draw(moment, history) {
    const ranks = moment.server.ranks;
    const known = JSON.stringify(ranks);
    if (known !== this.known) this.build(ranks);
    this.known = known;
    const byName = new Map(moment.ledger?.ranks.map((rank) => [rank.name, rank.shares]));
    this.boxes.forEach((box, index) => box.draw(moment, moment.stats?.ranks[index], byName.get(box.rank.name)));
    this.edges.forEach((edge, stage) => {
      const sent = (it) => it.stats?.ranks.filter((rank) => rank.stage === stage).reduce((sum, rank) => sum + rank.sent_bytes, 0);
      const rate = history.rate(sent);
      setText(edge, rate ? `${numberText(rate)}B/s` : "");
    });
  }

  lose() {
    this.boxes.forEach((box) => box.lose());
    this.edges.forEach((edge) => setText(edge, ""));
  }

  build(ranks) {
    this.boxes = ranks.map((rank) => new RankBox(rank));
    this.edges = [];
    const stages = [];
    const numStages = Math.max(0, ...ranks.map((rank) => rank.stage + 1));
    for (let stage = 0; stage < numStages; stage += 1) {
      const its = this.boxes.filter((box) => box.rank.stage === stage);
      stages.push(html("li", {}, html("h3", { class: "stage-name" }, `stage ${stage}`), html("ol", {}, ...its.map((box) => box.element))));
      if (stage + 1 < numStages) {
        this.edges.push(html("span"));
        stages.push(html("li", { class: "edge" }, html("span", { "aria-hidden": "true" }, "→"), html("br"), this.edges.at(-1)));
      }
    }
    this.place.replaceChildren(html("ol", { class: "stages", tabindex: 0, "aria-label": "Stages, in their order" }, ...stages));
  }
}
