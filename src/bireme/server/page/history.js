// The moments of the last minutes, and what is told of two of them: rates, and quantiles of what came between.

const MOST_MOMENTS = 300;
const QUANTILE_S = 60;
const GAP_S = 15; // no line is drawn over more

// As Prometheus' histogram_quantile: linear inside a bucket; of what is beyond the last bound, that bound.
export function quantileOf(share, bounds, counts) {
  const total = counts.at(-1);
  if (!total) return null;
  const index = counts.findIndex((count) => count >= share * total);
  if (index >= bounds.length) return bounds.at(-1);
  const [below, low] = index ? [counts[index - 1], bounds[index - 1]] : [0, 0];
  return low + ((bounds[index] - low) * (share * total - below)) / (counts[index] - below);
}

function histogramSince(name, now, before) {
  const [last, first] = [now.counts.histograms[name], before?.counts.histograms[name]];
  if (!last || !first) return null;
  return { bounds: last.bounds, counts: last.counts.map((count, index) => count - first.counts[index]) };
}

export class History {
  constructor() {
    this.points = []; // {time, values: {name: number or null}}
    this.moments = []; // of the last minute
  }

  // A server that began anew counts anew.
  add(moment) {
    const last = this.moments.at(-1);
    if (last && moment.server.created !== last.server.created) this.moments = [];
    if (this.points.length && moment.time_s - this.points.at(-1).time > GAP_S) this.points.push({ time: moment.time_s - 1, values: {} });
    this.moments.push(moment);
    while (this.moments.length > 2 && moment.time_s - this.moments[1].time_s >= QUANTILE_S) this.moments.shift();
    this.points.push({ time: moment.time_s, values: this.valuesNow() });
    if (this.points.length > MOST_MOMENTS) this.points.splice(0, this.points.length - MOST_MOMENTS);
  }

  // Of a number that counts up, a second.
  rate(read) {
    const [before, now] = this.moments.slice(-2);
    if (!now) return null;
    const [first, last] = [read(before), read(now)];
    if (first === undefined || last === undefined || last < first) return null;
    return (last - first) / (now.time_s - before.time_s);
  }

  quantile(name, share) {
    const since = histogramSince(name, this.moments.at(-1), this.moments[0]);
    return since && quantileOf(share, since.bounds, since.counts);
  }

  valuesNow() {
    const { stats } = this.moments.at(-1);
    const found = {
      prompt: this.rate((it) => it.counts.counters.prompt_tokens_total),
      generated: this.rate((it) => it.counts.counters.generation_tokens_total),
      images: this.rate((it) => it.stats?.num_images_total),
      running: stats?.num_running ?? null,
      waiting: stats?.num_waiting ?? null,
      cache: stats?.cache_usage ?? null,
    };
    for (const [short, name] of [["ttft", "time_to_first_token_seconds"], ["itl", "inter_token_latency_seconds"], ["e2e", "e2e_request_latency_seconds"]]) {
      for (const percent of [50, 90, 99]) found[`${short}${percent}`] = this.quantile(name, percent / 100);
    }
    return found;
  }

  series(names) {
    return { times: this.points.map((it) => it.time), series: names.map((name) => this.points.map((it) => it.values[name] ?? null)) };
  }
}
