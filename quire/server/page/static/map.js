// The map: every block of the pool as a square, or k blocks where there are too many to see.
//
// What a square shows: free; cached (content, but no owner); owned, filled from below as far as its positions are; shared by several
// sequences. A ring that fades: just copied, or just evicted.

import { $, count, duration, make, percent, plural, setText, shortId } from "./format.js";

const KINDS = ["owned", "shared", "cached", "free", "mine", "tail", "mine-tail", "copied", "evicted", "path", "surface", "ink"];
const STACK = ["mine", "shared", "owned", "cached"]; // from below, where a square stands for several blocks
const FLASH_MS = 1200;
const FADE_MS = 300; // between two steps of a fade where no picture comes, which draws too: each step draws the whole map
const LARGEST = 24, SMALLEST = 7; // of a square, in pixels with its gap
const FEWEST = 512; // blocks that are shown at least, where the pool has them

export class BlockMap {
  #canvas = $("map");
  #context = this.#canvas.getContext("2d");
  #tip = $("tip");
  #colours = {};
  #flashes = new Map(); // block → {kind, from}
  #cursor = null; // square under the pointer, or chosen with the keyboard
  #keyboard = false;
  #layout = { columns: 1, pitch: LARGEST, each: 1, blocks: 0, squares: 0 };
  #frame = 0;
  #later = 0; // timer of the next step of a fade
  #still = matchMedia("(prefers-reduced-motion: reduce)");

  /** selection: which sequences are to be seen; see requests.js. */
  constructor(view, selection) {
    this.view = view;
    this.selection = selection;
    this.whole = false;
    this.readColours();
    const canvas = this.#canvas;
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerdown", (event) => this.#point(event));
    canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.#leave()); // a finger leaves with each tap
    canvas.addEventListener("keydown", (event) => this.#press(event));
    canvas.addEventListener("blur", () => this.#leave());
    canvas.addEventListener("click", () => this.#choose());
    new ResizeObserver(() => this.redraw()).observe(canvas.parentElement);
    selection.listen(() => this.redraw());
    $("extent").addEventListener("click", () => {
      this.whole = !this.whole;
      $("extent").setAttribute("aria-pressed", this.whole);
      this.redraw();
    });
    this.#legend();
  }

  readColours() {
    const style = getComputedStyle(document.documentElement);
    for (const kind of KINDS) this.#colours[kind] = style.getPropertyValue(`--${kind}`).trim();
  }

  /** After a picture. */
  show() {
    const { facts } = this.view, now = performance.now();
    for (const kind of ["copied", "evicted"]) {
      for (const block of facts[kind]) this.#flashes.set(block, { kind, from: now });
    }
    this.#summarize();
    this.redraw();
    if (this.#cursor !== null) this.#describe();
  }

  redraw() {
    if (!this.#frame) this.#frame = requestAnimationFrame(() => this.#draw());
  }

  // Where squares are.

  #arrange() {
    const { view } = this;
    const total = view.states.length;
    let blocks = total;
    if (!this.whole) {
      blocks = FEWEST;
      while (blocks < view.touched) blocks *= 2;
      if (blocks > 0.75 * total) blocks = total;
    }
    $("extent").hidden = blocks === total && !this.whole;
    const width = this.#canvas.parentElement.clientWidth;
    const room = Math.max(200, Math.min(380, innerHeight - 430));
    let pitch = LARGEST, each = 1;
    const rows = () => Math.ceil(Math.ceil(blocks / each) / Math.floor(width / pitch));
    while (rows() * pitch > room) {
      if (pitch > SMALLEST) pitch -= 1;
      else each *= 2;
    }
    const columns = Math.floor(width / pitch);
    this.#layout = { columns, pitch, each, blocks, squares: Math.ceil(blocks / each), width, height: Math.max(200, rows() * pitch) };
  }

  #position(block) {
    const { columns, pitch, each } = this.#layout;
    const square = Math.floor(block / each);
    return [(square % columns) * pitch, Math.floor(square / columns) * pitch];
  }

  #blocksOf(square) {
    const { each, blocks } = this.#layout;
    const first = square * each;
    return Array.from({ length: Math.max(0, Math.min(each, blocks - first)) }, (_, i) => first + i);
  }

  // Drawing.

  #draw() {
    this.#frame = 0;
    if (!this.view.known) return;
    this.#arrange();
    const { width, height, pitch, each, squares } = this.#layout;
    const scale = devicePixelRatio || 1, canvas = this.#canvas, context = this.#context;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
      canvas.style.height = `${height}px`;
    }
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    const size = pitch - (pitch > 12 ? 2 : 1);
    const chosen = this.selection.blocks(this.view);
    for (let square = 0; square < squares; square++) {
      if (each === 1) this.#drawBlock(square, size, chosen);
      else this.#drawSeveral(square, size, chosen);
    }
    context.globalAlpha = 1;
    this.#drawPaths(size);
    this.#drawFlashes(size);
    if (this.#cursor !== null && this.#cursor < squares) {
      const [x, y] = this.#position(this.#cursor * each);
      context.strokeStyle = this.#colours.ink;
      context.lineWidth = 2;
      context.strokeRect(x - 1, y - 1, size + 2, size + 2);
    }
    setText($("scale"), this.#scaleText());
  }

  #isMine(block) {
    const { view } = this;
    return view.owner[block] >= 0 && this.selection.isMine(view.sequences[view.owner[block]].id);
  }

  #drawBlock(block, size, chosen) {
    const { view } = this, context = this.#context, colours = this.#colours;
    const [x, y] = this.#position(block);
    const kind = view.kind(block);
    context.globalAlpha = chosen && !chosen.has(block) ? 0.22 : 1;
    if (kind === "owned") {
      const mine = this.#isMine(block), part = view.fill[block] / view.facts.kv.block_size;
      context.fillStyle = colours[mine ? "mine-tail" : "tail"];
      context.fillRect(x, y, size, size);
      context.fillStyle = colours[mine ? "mine" : "owned"];
      context.fillRect(x, y + size * (1 - part), size, size * part);
      return;
    }
    context.fillStyle = colours[kind];
    context.fillRect(x, y, size, size);
    if (kind === "shared" && size >= 12) {
      context.fillStyle = colours.surface;
      context.font = `600 ${Math.min(11, size - 4)}px system-ui, sans-serif`;
      context.textAlign = "center";
      context.textBaseline = "middle";
      context.fillText(view.owners[block], x + size / 2, y + size / 2 + 0.5);
    }
  }

  #drawSeveral(square, size, chosen) {
    const { view } = this, context = this.#context;
    const blocks = this.#blocksOf(square), counts = { mine: 0, shared: 0, owned: 0, cached: 0, free: 0 };
    for (const block of blocks) {
      const kind = view.kind(block);
      counts[kind === "owned" && this.#isMine(block) ? "mine" : kind] += 1;
    }
    const [x, y] = this.#position(square * this.#layout.each);
    context.globalAlpha = chosen && !blocks.some((block) => chosen.has(block)) ? 0.22 : 1;
    context.fillStyle = this.#colours.free;
    context.fillRect(x, y, size, size);
    let bottom = y + size;
    for (const kind of STACK) {
      const height = (counts[kind] / blocks.length) * size;
      context.fillStyle = this.#colours[kind];
      context.fillRect(x, bottom - height, size, height);
      bottom -= height;
    }
  }

  /** Lines from block to block, in the order of the chosen sequences' tables: one for each group of layers. */
  #drawPaths(size) {
    const context = this.#context;
    context.strokeStyle = context.fillStyle = this.#colours.path;
    context.lineWidth = 1;
    for (const blocks of this.selection.sequences(this.view).flatMap((sequence) => this.#paths(sequence))) {
      if (!blocks.length) continue;
      context.globalAlpha = 0.55;
      context.beginPath();
      blocks.forEach((block, i) => {
        const [x, y] = this.#position(block);
        context[i ? "lineTo" : "moveTo"](x + size / 2, y + size / 2);
      });
      context.stroke();
      const [x, y] = this.#position(blocks[0]);
      context.globalAlpha = 1;
      context.beginPath();
      context.arc(x + size / 2, y + size / 2, Math.max(2, Math.min(4, size / 4)), 0, 2 * Math.PI);
      context.fill();
    }
  }

  #paths({ blocks }) {
    const { groups } = this.view.facts.kv;
    return Array.from({ length: groups }, (_, group) => blocks.filter((block, i) => i % groups === group && block >= 0));
  }

  #drawFlashes(size) {
    const context = this.#context, now = performance.now();
    for (const [block, { kind, from }] of this.#flashes) {
      const age = (now - from) / FLASH_MS;
      if (age >= 1) {
        this.#flashes.delete(block);
        continue;
      }
      const [x, y] = this.#position(block);
      context.globalAlpha = this.#still.matches ? 1 : 1 - age;
      context.strokeStyle = this.#colours[kind];
      context.lineWidth = Math.max(1.5, size / 6);
      context.strokeRect(x + 0.5, y + 0.5, size - 1, size - 1);
    }
    context.globalAlpha = 1;
    clearTimeout(this.#later);
    if (this.#flashes.size && !this.#still.matches) this.#later = setTimeout(() => this.redraw(), FADE_MS);
  }

  // Words.

  #summarize() {
    const { kv } = this.view.facts, free = kv.num_blocks - kv.used - kv.cached;
    const owned = kv.used - kv.shared;
    const saved = kv.saved ? `, sharing saves ${count(kv.saved)}` : "";
    const held = kv.groups > 1 ? ` in use, each for ${kv.block_size} tokens in 1 of ${kv.groups} groups of layers` : ` of ${kv.block_size} tokens in use`;
    setText($("map-summary"), `${count(kv.used)} of ${plural(kv.num_blocks, "block")}${held}${saved}`);
    const share = $("share");
    const parts = [["owned", owned], ["shared", kv.shared], ["cached", kv.cached]];
    if (!share.children.length) share.append(...parts.map(([kind]) => make("i", { className: kind })));
    parts.forEach(([, n], i) => (share.children[i].style.width = `${(n / kv.num_blocks) * 100}%`));
    const label = `${percent(owned / kv.num_blocks)} owned, ${percent(kv.shared / kv.num_blocks)} shared, ${percent(kv.cached / kv.num_blocks)} cached`;
    if (share.getAttribute("aria-label") !== label) share.setAttribute("aria-label", label);
    this.#canvas.setAttribute("aria-label", `KV blocks: ${count(owned)} owned, ${count(kv.shared)} shared, ${count(kv.cached)} cached, ${count(free)} free`);
    for (const [kind, n] of [...parts, ["free", free]]) setText(this.counts[kind], count(n));
    this.yours.hidden = !this.selection.hasMine;
  }

  #legend() {
    this.counts = {};
    const items = [["owned", "owned"], ["shared", "shared"], ["cached", "cached"], ["free", "free"], ["mine", "yours"], ["copied", "just copied"], ["evicted", "just evicted"]];
    for (const [kind, text] of items) {
      const item = make("li", {}, make("i", { className: kind }), text);
      if (["owned", "shared", "cached", "free"].includes(kind)) item.append((this.counts[kind] = make("b")));
      if (kind === "mine") this.yours = item;
      $("legend").append(item);
    }
  }

  #scaleText() {
    const { each, blocks } = this.#layout, total = this.view.states.length;
    const scale = each === 1 ? "Each square is a block." : `Each square is ${each} blocks, in proportion.`;
    return blocks < total ? `${scale} The other ${count(total - blocks)} were never used.` : scale;
  }

  #words(square) {
    const { view } = this;
    const blocks = this.#blocksOf(square);
    if (!blocks.length) return null;
    if (blocks.length > 1) {
      const counts = {};
      for (const block of blocks) counts[view.kind(block)] = (counts[view.kind(block)] ?? 0) + 1;
      const owners = new Set(blocks.filter((b) => view.owner[b] >= 0).map((b) => shortId(view.sequences[view.owner[b]].id)));
      const lines = Object.entries(counts).map(([kind, n]) => `${n} ${kind}`).join(", ");
      return [`Blocks ${count(blocks[0])} to ${count(blocks.at(-1))}`, lines, ...(owners.size ? [`of ${[...owners].slice(0, 4).join(", ")}${owners.size > 4 ? ` and ${owners.size - 4} more` : ""}`] : [])];
    }
    const [block] = blocks, kind = view.kind(block);
    const age = duration(Math.max(0, view.facts.now - view.since[block]));
    const owners = view.ownersOf(block);
    if (block >= view.touched) return [`Block ${count(block)}: free`, "never used"];
    if (kind === "free") return [`Block ${count(block)}: free`, `for ${age}`];
    const { block_size: size, groups, full_groups: full, window } = view.facts.kv;
    const there = window ? ", where all that its windows show is there too" : "";
    if (kind === "cached") return [`Block ${count(block)}: cached`, `no owner for ${age}; a prompt that begins like its content finds it${there}`];
    const sees = (group) => (group < full ? "see everything" : `see the last ${count(window)} tokens`);
    const layers = (group) => (groups > 1 ? `, for layers that ${sees(group)} (group ${group + 1} of ${groups})` : "");
    const where = ({ blocks }, at) => `its block ${Math.floor(at / groups) + 1} of ${blocks.length / groups}${layers(at % groups)}`;
    const who = owners.slice(0, 4).map((s) => `${shortId(s.id)}, sequence ${s.index + 1}, ${where(s, s.blocks.indexOf(block))}`);
    if (owners.length > 4) who.push(`and ${owners.length - 4} more`);
    return [`Block ${count(block)}: ${owners.length > 1 ? `shared by ${owners.length}` : "owned"}`, ...who, `${view.fill[block]} of ${size} positions filled, for ${age}`];
  }

  // Pointer and keyboard.

  #point(event) {
    if (!this.view.known) return;
    const { columns, pitch, squares } = this.#layout;
    const box = this.#canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / pitch);
    const square = Math.floor((event.clientY - box.top) / pitch) * columns + column;
    this.#keyboard = false;
    this.#move(column < columns && square < squares ? square : null);
  }

  #press(event) {
    const { columns, squares } = this.#layout;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
    let to = null;
    if (event.key in steps) to = this.#cursor === null ? 0 : this.#cursor + steps[event.key];
    else if (event.key === "Home") to = 0;
    else if (event.key === "End") to = squares - 1;
    else if (event.key === "Escape") return this.selection.clear(), this.#leave();
    else if (event.key === "Enter" || event.key === " ") return event.preventDefault(), this.#choose();
    else return;
    event.preventDefault();
    this.#keyboard = true;
    this.#move(Math.max(0, Math.min(squares - 1, to)));
    setText($("spoken"), (this.#words(this.#cursor) ?? []).join(". "));
  }

  #move(square) {
    this.#cursor = square;
    if (square === null) return this.#leave();
    const block = this.#blocksOf(square).find((b) => this.view.owner[b] >= 0);
    const owner = block === undefined ? null : this.view.sequences[this.view.owner[block]];
    this.selection.hover(owner && owner.key);
    this.#describe();
    this.redraw();
  }

  /** The sequences of the block stay chosen, until something else is. */
  #choose() {
    if (this.selection.hovered) this.selection.pin(this.selection.hovered);
    else this.selection.clear();
  }

  #describe() {
    const words = this.#words(this.#cursor);
    this.#tip.hidden = words === null;
    if (words === null) return;
    this.#tip.replaceChildren(make("b", {}, words[0]), ...words.slice(1).flatMap((line) => [make("br"), line]));
    const { each, pitch, width } = this.#layout;
    const [x, y] = this.#position(this.#cursor * each);
    const tip = this.#tip;
    tip.style.left = `${Math.max(0, Math.min(width - tip.offsetWidth, x + pitch + 6))}px`;
    tip.style.top = `${y + pitch + 8}px`;
  }

  #leave() {
    this.#cursor = null;
    this.#tip.hidden = true;
    this.selection.hover(null);
    this.redraw();
  }
}
