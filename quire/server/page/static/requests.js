// The sequences that run and wait, and which of them is being looked at.

import { $, count, make, plural, setText, shortId } from "./format.js";

const MOST = 48; // rows
const MOST_BLOCKS = 64; // of a table in words
const REASONS = { memory: "waits for memory", rows: "waits for a free row", prompt: "waits for another's prompt", budget: "waits for its turn" };

/** What is hovered or pinned, and which requests were sent from this page. */
export class Selection {
  #listeners = [];
  #mine = new Set(); // ids of calls; their requests are called id-0, id-1, ...
  hovered = null;
  pinned = null;

  get hasMine() {
    return this.#mine.size > 0;
  }

  listen(listener) {
    this.#listeners.push(listener);
  }

  #tell() {
    for (const listener of this.#listeners) listener();
  }

  hover(key) {
    if (this.hovered === key) return;
    this.hovered = key;
    this.#tell();
  }

  pin(key) {
    this.pinned = this.pinned === key ? null : key;
    this.#tell();
  }

  clear() {
    this.pinned = this.hovered = null;
    this.#tell();
  }

  claim(callId) {
    this.#mine.add(callId);
  }

  isMine(requestId) {
    return this.#mine.has(requestId.slice(0, requestId.lastIndexOf("-")));
  }

  sequences(view) {
    const key = this.hovered ?? this.pinned;
    return key === null ? [] : view.sequences.filter((s) => s.key === key);
  }

  /** Blocks that stand out; null where all are alike. */
  blocks(view) {
    const sequences = this.sequences(view);
    return sequences.length ? new Set(sequences.flatMap((s) => s.blocks)) : null;
  }
}

/** Its beginning and its end. Blocks with a / between them are those of the same tokens, one of each group of layers; a dot is one that a
 * window has left behind. */
function tableInWords(blocks, groups) {
  const logical = Array.from({ length: blocks.length / groups }, (_, i) => blocks.slice(i * groups, (i + 1) * groups));
  const left = Math.max(0, logical.findIndex((each) => each.some((block) => block >= 0)));
  const words = logical.slice(left).map((each) => each.map((block) => (block < 0 ? "·" : block)).join("/"));
  const half = Math.ceil(MOST_BLOCKS / groups / 2), rest = words.length - 2 * half;
  if (rest > 0) words.splice(half, rest, `${count(rest)} more`);
  if (left) words.unshift(`${count(left)} that the window has left`);
  return `block table${groups > 1 ? ` of ${groups} groups of layers` : ""}: ${words.join(" → ")}`;
}

export class Sequences {
  #rows = new Map(); // key → elements

  constructor(view, selection) {
    this.view = view;
    this.selection = selection;
    selection.listen(() => this.#mark());
  }

  show() {
    const { facts, sequences } = this.view;
    const waits = Object.entries(facts.waiting_for).map(([reason, n]) => `${count(n)} ${n === 1 ? REASONS[reason] : REASONS[reason].replace("waits", "wait").replace("its", "their")}`);
    setText($("queue"), [`${count(facts.running)} running`, ...waits].join(", "));
    const shown = sequences.slice(0, MOST);
    const keys = new Set(shown.map((sequence) => sequence.key));
    for (const [key, row] of this.#rows) {
      if (keys.has(key)) continue;
      row.item.remove(); // before the others are looked at: a row that is moved loses the focus
      this.#rows.delete(key);
    }
    const list = $("sequences");
    shown.forEach((sequence, i) => {
      const row = this.#row(sequence);
      if (list.children[i] !== row.item) list.insertBefore(row.item, list.children[i] ?? null);
      this.#fill(row, sequence);
    });
    const total = facts.running + facts.waiting;
    const rest = total - shown.length;
    setText($("more"), total === 0 ? "Nothing runs. Send a prompt and watch it take blocks." : rest > 0 ? `and ${count(rest)} more` : "");
  }

  #row(sequence) {
    let row = this.#rows.get(sequence.key);
    if (row) return row;
    const parts = { name: make("span", { className: "name mono" }), count: make("span", { className: "count" }), table: make("span", { className: "table mono", hidden: true }) };
    const track = make("span", { className: "track" }, ...["hit", "known", "made"].map((className) => make("i", { className })));
    const button = make("button", { type: "button", title: sequence.id }, parts.name, parts.count, track, parts.table);
    const { key } = sequence;
    button.addEventListener("pointerenter", () => this.selection.hover(key));
    button.addEventListener("pointerleave", () => this.selection.hover(null));
    button.addEventListener("focus", () => this.selection.hover(key));
    button.addEventListener("blur", () => this.selection.hover(null));
    button.addEventListener("click", () => this.selection.pin(key));
    row = { ...parts, track: [...track.children], button, item: make("li", {}, button) };
    this.#rows.set(key, row);
    this.#mark();
    return row;
  }

  #fill(row, s) {
    const waiting = s.waits_for !== null;
    row.button.className = `sequence${waiting ? " waiting" : ""}${this.selection.isMine(s.id) ? " mine" : ""}`;
    setText(row.name, `${shortId(s.id)} ·${s.index + 1}`);
    const state = waiting ? `${s.preempted ? "preempted, " : ""}${REASONS[s.waits_for]}` : plural(s.blocks.filter((block) => block >= 0).length, "block");
    setText(row.count, `${count(s.tokens)} of ${count(s.most)} tokens, ${state}`);
    const hit = Math.min(s.cached ?? 0, s.computed), known = Math.min(s.computed, s.prompt) - hit;
    const widths = [hit, Math.max(0, known), Math.max(0, s.computed - s.prompt)];
    row.track.forEach((part, i) => (part.style.width = `${(widths[i] / s.most) * 100}%`));
    const pinned = this.selection.pinned === s.key;
    row.table.hidden = !pinned;
    if (pinned) {
      setText(row.table, tableInWords(s.blocks, this.view.facts.kv.groups));
    }
  }

  #mark() {
    for (const [key, row] of this.#rows) {
      row.button.setAttribute("aria-pressed", this.selection.pinned === key);
      if (this.selection.pinned !== key) row.table.hidden = true;
    }
    if (this.selection.pinned !== null) {
      const sequence = this.view.sequences.find((s) => s.key === this.selection.pinned);
      if (sequence && this.#rows.has(sequence.key)) this.#fill(this.#rows.get(sequence.key), sequence);
    }
  }
}
