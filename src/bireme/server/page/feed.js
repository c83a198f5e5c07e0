// Follows /debug/live: begins again by itself, later and later while nothing answers, and rests while the page
// is hidden, so that the server does no work for nobody.

import { ask, eventsOf, Failed, refusalOf } from "./sse.js";

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 5000;
const SILENCE_MS = 30000; // then the connection is given up

export class Feed {
  // Calls: onMoment(moment), onLost(text) when there is no connection, onRefused() where the key is wrong.
  constructor({ headers, onMoment, onLost, onRefused }) {
    Object.assign(this, { headers, onMoment, onLost, onRefused });
    this.isOver = false;
    this.attempt = null;
    this.wake = () => {};
    this.onVisibility = () => (document.hidden ? this.attempt?.abort() : this.wake());
    document.addEventListener("visibilitychange", this.onVisibility);
    this.run();
  }

  close() {
    this.isOver = true;
    document.removeEventListener("visibilitychange", this.onVisibility);
    this.attempt?.abort();
    this.wake();
  }

  async run() {
    let wait = FIRST_WAIT_MS;
    while (!this.isOver) {
      if (document.hidden) {
        await this.rest(2 ** 31 - 1);
        continue;
      }
      this.numMoments = 0;
      const lost = await this.follow().catch((error) => {
        if (error instanceof Failed) return error.message;
        if (error.name === "AbortError") return "no answer";
        throw error;
      });
      if (this.isOver) return;
      if (this.numMoments) wait = FIRST_WAIT_MS;
      if (!document.hidden) this.onLost(lost);
      await this.rest(wait * (0.75 + 0.5 * Math.random()));
      wait = Math.min(2 * wait, LONGEST_WAIT_MS);
    }
  }

  rest(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  // A fault in what draws is reported, and the next moment is drawn all the same.
  tell(moment) {
    try {
      this.onMoment(moment);
    } catch (error) {
      reportError(error);
    }
  }

  // Until the stream ends; why it did.
  async follow() {
    this.attempt = new AbortController();
    let silence = setTimeout(() => this.attempt.abort(), SILENCE_MS);
    try {
      const response = await ask("debug/live", { headers: this.headers, signal: this.attempt.signal, cache: "no-store" });
      if (response.status === 401) {
        this.close();
        this.onRefused();
        return "";
      }
      if (!response.ok) throw await refusalOf(response);
      for await (const data of eventsOf(response)) {
        clearTimeout(silence);
        silence = setTimeout(() => this.attempt.abort(), SILENCE_MS);
        this.numMoments += 1;
        this.tell(JSON.parse(data));
      }
      return "the server ended the connection";
    } finally {
      clearTimeout(silence);
      this.attempt.abort();
    }
  }
}
