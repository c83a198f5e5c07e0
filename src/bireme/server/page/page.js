// The live page: asks for the key where there is one, follows the server, and has each view draw each moment.
// A moment is an event of /debug/live; /openapi.json says what it holds.

import { Chat } from "./chat.js";
import { setText } from "./elements.js";
import { Feed } from "./feed.js";
import { hatches } from "./rows.js";
import { Views } from "./views.js";

const KEY = "bireme-api-key"; // of this tab alone
const at = (id) => document.getElementById(id);
const hasKeys = document.documentElement.dataset.hasKeys === "yes";
const chat = new Chat(headers);
let feed = null;
let views = null;

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function tellHealth(is, text) {
  at("health").dataset.is = is;
  setText(at("health"), text);
}

// Of a server that does not answer, what is shown was so once.
function setStale(isStale) {
  at("stale").hidden = !isStale;
  document.querySelector(".views").dataset.is = isStale ? "stale" : "";
  if (isStale) views.lose();
  else setText(at("stale"), "");
}

function onLost(why) {
  tellHealth("bad", `${why}; trying again`);
  if (!at("stale").hidden || !views.lastTime) return;
  setStale(true);
  setText(at("stale"), `Nothing is known of the server since ${new Date(views.lastTime * 1e3).toLocaleTimeString()}: what is below was so until then.`);
}

function onMoment(moment) {
  setStale(false);
  const { status, doing, error } = moment.health;
  tellHealth(status === "ready" ? "ready" : error ? "bad" : "waiting", [status, doing ?? error].filter(Boolean).join(": "));
  const { models, can_chat: canChat, told, version } = moment.server;
  setText(at("model"), models.join(", "));
  setText(at("layout"), (told[0] ?? "").replace(/^.*?: /, ""));
  at("layout").title = `Bireme ${version}`;
  at("chat").hidden = !canChat;
  at("pause").hidden = false;
  if (at("pause").getAttribute("aria-pressed") === "false") views.draw(moment);
}

function askForKey(error = "") {
  sessionStorage.removeItem(KEY);
  at("live").hidden = at("pause").hidden = at("forget").hidden = true;
  for (const id of ["model", "layout", "health"]) setText(at(id), "");
  views?.clear();
  chat.forget();
  setStale(false);
  at("key-form").hidden = false;
  setText(at("key-error"), error);
  at("key").focus();
}

function follow() {
  at("key-form").hidden = true;
  at("live").hidden = false;
  at("forget").hidden = !hasKeys;
  tellHealth("waiting", "connecting");
  views ??= new Views();
  feed = new Feed({
    headers: headers(),
    onMoment,
    onLost,
    onRefused: () => askForKey("The server does not take this key."),
  });
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value);
  at("key").value = "";
  follow();
});
at("forget").addEventListener("click", () => {
  feed.close();
  askForKey();
});
at("pause").addEventListener("click", () => {
  const isPaused = at("pause").getAttribute("aria-pressed") === "false";
  at("pause").setAttribute("aria-pressed", String(isPaused));
});

document.body.append(hatches());
if (hasKeys && !sessionStorage.getItem(KEY)) askForKey();
else follow();
