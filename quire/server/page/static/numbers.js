// The tiles at the top, the histograms, what to change, and what happened.

import { Histogram, Sparkline } from "./charts.js";
import { $, count, duration, make, percent, plural, rate, setText } from "./format.js";

const TILES = [
  ["Output", (f) => [rate(f.rates.sampled), "tokens/s", `${count(f.rates.computed ?? 0)} positions/s computed`], (f) => f.rates.sampled],
  ["Sequences", (f) => [count(f.running), "running", f.waiting ? `${count(f.waiting)} wait` : "nobody waits"], (f) => f.running + f.waiting],
  ["First token", (f) => [duration(f.latency.first.p50), "median", `95 % within ${duration(f.latency.first.p95)}`], (f) => f.latency.first.p50],
  ["Between tokens", (f) => [duration(f.latency.between.p50), "median", `95 % within ${duration(f.latency.between.p95)}`], (f) => f.latency.between.p50],
  ["Memory in use", (f) => [percent(f.kv.used / f.kv.num_blocks), "of the pool", waste(f.kv)], (f) => f.kv.used / f.kv.num_blocks],
  ["Prompts found", (f) => [percent(hits(f.totals)), "in the cache", `${count(f.totals.hit_tokens)} of ${count(f.totals.prompt_tokens)} tokens`], (f) => hits(f.totals)],
];

const hits = (totals) => (totals.prompt_tokens ? totals.hit_tokens / totals.prompt_tokens : 0);

function waste(kv) {
  return kv.used ? `${percent(kv.empty_tail / (kv.used * kv.block_size))} of it empty tails` : "nothing is allocated";
}

export class Numbers {
  #tiles = TILES.map(([name, texts, value]) => {
    const tile = { texts, value, spark: new Sparkline(), big: document.createTextNode("–"), unit: make("small"), note: make("div", { className: "note" }) };
    $("numbers").append(make("div", { className: "number" }, tile.spark.element, make("h3", {}, name), make("div", { className: "value" }, tile.big, " ", tile.unit), tile.note));
    return tile;
  });
  #histograms = [["first", "First token"], ["between", "Between tokens"]].map(([name, title]) => {
    const made = { name, title, chart: new Histogram(), text: make("span") };
    $(name).append(make("figcaption", {}, make("b", {}, title), made.text), made.chart.element);
    return made;
  });

  show(facts) {
    for (const tile of this.#tiles) {
      const [big, unit, note] = tile.texts(facts);
      if (tile.big.data !== big) tile.big.data = big;
      setText(tile.unit, unit);
      setText(tile.note, note);
      tile.spark.add(tile.value(facts) ?? NaN);
    }
    const { latency } = facts;
    for (const { name, title, chart, text } of this.#histograms) {
      const { counts, p50, p95 } = latency[name];
      const total = counts.reduce((sum, n) => sum + n, 0);
      const said = total ? `median ${duration(p50)}, 95 % within ${duration(p95)}, ${count(total)} measured` : "none yet";
      setText(text, said);
      chart.show(latency[name], `${title}: ${said}`);
    }
    this.#advise(facts.advice);
  }

  #advise(sentences) {
    const place = $("advice");
    place.hidden = sentences.length === 0;
    const text = sentences.join("\n");
    if (place.dataset.text === text) return;
    place.dataset.text = text;
    place.replaceChildren(...sentences.map((sentence) => make("p", {}, ...options(sentence))));
  }
}

/** Options (--kv-memory) stand out. */
function options(sentence) {
  return sentence.split(/(--[a-z-]+(?: (?:int8|no-evict))?)/).map((part) => (part.startsWith("--") ? make("code", {}, part) : part));
}

const MOST_LINES = 60;

/** What happened, the newest first. */
export class Happened {
  #engine = null;

  show(facts) {
    const { engine } = facts;
    const before = this.#engine;
    this.#engine = engine;
    if (before === null) {
      this.say("", engine.restarts ? `watching; ${plural(engine.restarts, "engine")} died before` : "watching");
    } else if (before.state !== engine.state || before.restarts !== engine.restarts) {
      if (engine.state === "restarting") this.say("bad", `${engine.last_death}; another one is being started`);
      else if (engine.state === "dead") this.say("bad", engine.last_death);
      else if (engine.restarts > before.restarts) {
        if (before.state !== "restarting") this.say("bad", engine.last_death);
        this.say("good", "another engine is there; what was in flight goes on");
      } else if (engine.state === "draining") this.say("", "the server is being stopped: it finishes what it has");
      else if (engine.state === "busy") this.say("", "the engine is busy with a long step");
    }
    for (const text of facts.preemptions ?? []) this.say("", text);
  }

  say(kind, text) {
    const now = new Date();
    const list = $("happened");
    list.prepend(make("li", {}, make("time", { dateTime: now.toISOString() }, now.toTimeString().slice(0, 8)), make("span", { className: kind }, text)));
    while (list.children.length > MOST_LINES) list.lastChild.remove();
  }
}
