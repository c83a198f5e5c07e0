// A conversation with the model, streamed from /v1/chat/completions.

import { html, setText } from "./elements.js";
import { ask, eventsOf, Failed, refusalOf } from "./sse.js";

const at = (id) => document.getElementById(id);

export class Chat {
  constructor(headers) {
    this.headers = headers;
    this.messages = [];
    this.running = null;
    at("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    at("chat-text").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      at("chat-form").requestSubmit();
    });
    at("chat-stop").addEventListener("click", () => this.running?.abort());
    at("chat-clear").addEventListener("click", () => {
      this.clear();
      at("chat-text").focus();
    });
  }

  clear() {
    this.running?.abort();
    this.messages = [];
    at("chat-log").replaceChildren();
    setText(at("chat-error"), "");
  }

  // What is being written too.
  forget() {
    this.clear();
    at("chat-text").value = "";
  }

  show(role) {
    const element = html("p", { class: role });
    at("chat-log").append(element);
    return element;
  }

  async send() {
    const content = at("chat-text").value.trim();
    if (!content || this.running) return;
    const messages = this.messages;
    messages.push({ role: "user", content });
    setText(this.show("user"), content);
    at("chat-text").value = "";
    setText(at("chat-error"), "");
    this.running = new AbortController();
    this.setBusy(true);
    const answer = { role: "assistant", content: "" };
    try {
      await this.stream(messages, answer, this.show("assistant"));
    } catch (error) {
      if (error instanceof Failed) setText(at("chat-error"), error.message);
      else if (error.name !== "AbortError") throw error;
    } finally {
      this.end(messages, answer);
    }
  }

  // A question without an answer is taken back, so that it can be asked again.
  end(messages, answer) {
    const isShown = this.messages === messages; // or a new conversation has begun
    if (answer.content) messages.push(answer);
    else if (isShown) {
      const { content } = messages.pop();
      for (const element of [...at("chat-log").children].slice(-2)) element.remove();
      at("chat-text").value ||= content;
    }
    this.running = null;
    this.setBusy(false);
  }

  setBusy(isBusy) {
    at("chat-log").setAttribute("aria-busy", String(isBusy)); // what is whole is read out, not each piece
    at("chat-stop").hidden = !isBusy;
    at("chat-send").disabled = isBusy;
  }

  async model(signal) {
    const response = await ask("v1/models", { headers: this.headers(), signal });
    if (!response.ok) throw await refusalOf(response);
    return (await response.json()).data[0].id;
  }

  async stream(messages, answer, element) {
    const { signal } = this.running;
    const body = JSON.stringify({ model: await this.model(signal), messages, stream: true });
    const headers = { ...this.headers(), "Content-Type": "application/json" };
    const response = await ask("v1/chat/completions", { method: "POST", headers, body, signal });
    if (!response.ok) throw await refusalOf(response);
    for await (const data of eventsOf(response)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failed(event.error.message);
      this.add(answer, element, event.choices[0]?.delta.content ?? "");
    }
    throw new Failed("the answer broke off");
  }

  add(answer, element, text) {
    const log = at("chat-log");
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 24;
    answer.content += text;
    element.textContent = answer.content;
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  }
}
