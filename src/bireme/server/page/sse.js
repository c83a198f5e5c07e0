// Server-sent events of a fetch, which unlike EventSource can send the key.

// What is no fault of this page, and is to be told: the connection is lost, the server refuses.
export class Failed extends Error {}

function failedOf(error) {
  return error.name === "AbortError" ? error : new Failed("no connection");
}

// As fetch; Failed where nothing answers.
export async function ask(path, options) {
  return fetch(path, options).catch((error) => Promise.reject(failedOf(error)));
}

// Yields the data of each event, as text; Failed where the connection breaks.
export async function* eventsOf(response) {
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => Promise.reject(failedOf(error)));
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const lines = event.split("\n").filter((line) => line.startsWith("data: "));
      yield lines.map((line) => line.slice(6)).join("\n");
    }
  }
}

// What a server says in an answer that is no success, whatever its body.
export async function refusalOf(response) {
  const body = await response.json().catch(() => null);
  const told = body?.error?.message ?? body?.error;
  return new Failed(typeof told === "string" ? told : `the server answered ${response.status}`);
}
