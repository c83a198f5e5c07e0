// Server-sent events of a fetch, which unlike EventSource can send the key.

// Yields the data of each event, as text.
export async function* eventsOf(response) {
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
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

// The message of an error of the server, whatever its body.
export async function errorOf(response) {
  const body = await response.json().catch(() => null);
  const told = body?.error?.message ?? body?.error;
  return typeof told === "string" ? told : `the server answered ${response.status}`;
}
