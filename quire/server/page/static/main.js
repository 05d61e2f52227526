// Puts the parts together: feed → view → map, numbers, sequences.

import { follow, hasKey, isKey, keep, recall, setKey, View } from "./feed.js";
import { $, setText } from "./format.js";
import { BlockMap } from "./map.js";
import { Happened, Numbers } from "./numbers.js";
import { Prompt } from "./prompt.js";
import { Selection, Sequences } from "./requests.js";

const THEMES = [["auto", "Auto", "as the system"], ["light", "Light", "light"], ["dark", "Dark", "dark"]];
const STATES = {
  running: "running", busy: "busy with a long step", draining: "finishing what it has", restarting: "engine died, starting another",
  dead: "engine died", stopping: "stopping", away: "no connection", connecting: "connecting",
};

const view = new View();
const selection = new Selection();
const map = new BlockMap(view, selection);
const numbers = new Numbers();
const sequences = new Sequences(view, selection);
const happened = new Happened();
new Prompt((id) => selection.claim(id), askForKey);

function show() {
  const { facts } = view, { engine, server } = facts;
  setText($("model"), server.model);
  state(engine.state, engine.restarts ? `, ${engine.restarts} ${engine.restarts === 1 ? "restart" : "restarts"}` : "");
  happened.show(facts);
  const gone = ["restarting", "dead"].includes(engine.state);
  cover(gone ? "The engine is gone" : "", gone ? `${sentence(engine.last_death)}. ${engine.state === "dead" ? "No other one could be started." : "Another one is being started, and what is in flight goes on there."}` : "");
  if (!view.known || gone) return;
  numbers.show(facts);
  map.show();
  sequences.show();
  document.title = `${facts.running} running · Quire`;
  const share = ((engine.look_s / engine.interval_s) * 100).toFixed(2);
  setText($("about"), `Quire ${server.version}. Showing this takes ${share} % of the engine's time, and nothing while nobody watches; what this browser takes comes on top.`);
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1);

function state(name, more = "") {
  const pill = $("engine");
  pill.dataset.state = name;
  setText(pill, STATES[name] + more);
}

/** Over the map, where there is none. */
function cover(title, text) {
  const overlay = $("overlay");
  overlay.parentElement.classList.toggle("away", title !== "");
  overlay.hidden = title === "";
  if (overlay.dataset.text === title + text) return;
  overlay.dataset.text = title + text;
  overlay.replaceChildren(Object.assign(document.createElement("strong"), { textContent: title }), Object.assign(document.createElement("span"), { textContent: text }));
}

async function away(reason) {
  state("away");
  if (reason === "key") {
    cover("A key is asked for", "This server shows its memory only to those who have one of its API keys.");
    await askForKey();
  } else {
    cover("No connection", `${reason}; trying again every second.`);
  }
}

/** Until the dialog is closed. */
function askForKey() {
  const dialog = $("key-dialog");
  $("key-button").hidden = false;
  if (!dialog.open) dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => {
    if ($("key").value && isKey($("key").value)) setKey($("key").value);
    $("key").value = "";
    done();
  }, { once: true }));
}

function theme(name) {
  const [, label, words] = THEMES.find(([known]) => known === name);
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").textContent = label;
  $("theme").setAttribute("aria-label", `Colours: ${words}`);
  $("theme").dataset.theme = name;
  map.readColours();
  map.redraw();
}

$("theme").addEventListener("click", () => {
  const now = THEMES.findIndex(([name]) => name === $("theme").dataset.theme);
  const [next] = THEMES[(now + 1) % THEMES.length];
  keep("localStorage", "quire-theme", next);
  theme(next);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme($("theme").dataset.theme));
const kept = recall("localStorage", "quire-theme");
theme(THEMES.some(([name]) => name === kept) ? kept : "auto");

$("key-button").hidden = !hasKey();
$("key-button").addEventListener("click", askForKey);
$("key").addEventListener("input", () => {
  $("key").setCustomValidity(isKey($("key").value) ? "" : "A key has no spaces, and no characters beyond ASCII. Was it copied whole, and nothing else?");
});
follow(view, show, away);
