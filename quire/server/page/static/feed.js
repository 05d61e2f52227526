// The feed: pictures of the engine as server-sent events, the first one whole, then what has changed. fetch() and not EventSource,
// because the key goes into a header.

const EMPTY = 0, OWNED = 1;
const RETRY_MS = 1000;
const SILENT_MS = 40_000; // the server says something every 15 seconds
const UNSEEN_MS = 30_000; // a browser has six connections to a server: tabs that nobody looks at leave theirs to others
const UNSEEN = "unseen";

/** What the browser has kept, "" where there is nothing. Storage that is blocked throws when it is touched. */
export function recall(storage, name) {
  try {
    return window[storage].getItem(name) ?? "";
  } catch {
    return "";
  }
}

export function keep(storage, name, value) {
  try {
    window[storage].setItem(name, value);
  } catch {} // then it is gone with the page
}

let key = recall("sessionStorage", "quire-key");

export function setKey(value) {
  key = value.trim();
  keep("sessionStorage", "quire-key", key);
}

/** Whether a header can bring it. */
export const isKey = (value) => /^[\x21-\x7e]*$/.test(value.trim());

export const hasKey = () => key !== "";

export function headers(more = {}) {
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

/** What the server shows now. Blocks are arrays over all ids of the pool. */
export class View {
  constructor() {
    this.facts = null; // as sent: engine, server, kv, rates, ...
    this.states = new Uint8Array(0);
    this.since = new Float64Array(0);
    this.owners = new Uint16Array(0); // block tables that hold a block
    this.owner = new Int32Array(0); // index into sequences of the last of them, -1: none
    this.place = new Int32Array(0); // where it is in that table
    this.fill = new Uint16Array(0); // positions that are filled
    this.sequences = [];
    this.touched = 0; // blocks with an id below were in use at some time
  }

  get known() {
    return this.facts !== null && this.facts.kv !== undefined;
  }

  apply(picture) {
    const before = this.facts;
    if (picture.kv === undefined) { // no engine to look at: what was seen last stays, and is shown as that
      this.facts = { ...before, ...picture, preemptions: [], copied: [], evicted: [] }; // what has happened has been shown
      return;
    }
    this.facts = picture;
    if (picture.whole) this.#reset(picture);
    else this.#change(picture.blocks);
    this.#follow(picture);
    this.#assign(picture.kv);
  }

  #reset({ blocks, kv }) {
    const size = kv.num_blocks;
    this.states = new Uint8Array(size);
    this.since = new Float64Array(size);
    this.owners = new Uint16Array(size);
    this.owner = new Int32Array(size).fill(-1);
    this.place = new Int32Array(size);
    this.fill = new Uint16Array(size);
    this.sequences = [];
    const states = bytes(blocks.states);
    this.states.set(states);
    this.since.set(new Float64Array(bytes(blocks.since).buffer));
    this.touched = states.length;
  }

  #change({ ids, states, since }) {
    ids.forEach((id, i) => {
      this.states[id] = states[i];
      this.since[id] = since[i];
      if (id >= this.touched) this.touched = id + 1;
    });
  }

  #follow({ sequences }) {
    const before = new Map(this.sequences.map((s) => [s.key, s.blocks]));
    this.sequences = sequences.map((s) => {
      const key = `${s.id}/${s.index}/${s.row}`;
      return { ...s, key, blocks: s.known ? before.get(key).slice(0, s.known).concat(s.blocks) : s.blocks };
    });
  }

  #assign({ block_size: size, groups }) {
    this.owners.fill(0);
    this.owner.fill(-1);
    this.fill.fill(0);
    this.sequences.forEach((sequence, number) => {
      sequence.blocks.forEach((block, i) => {
        if (block < 0) return;
        const at = Math.floor(i / groups); // a logical block is a block of each group of layers
        this.owners[block] += 1;
        this.owner[block] = number;
        this.place[block] = at;
        this.fill[block] = Math.max(this.fill[block], Math.min(size, sequence.computed - at * size));
      });
    });
  }

  /** free, cached, owned, shared */
  kind(block) {
    if (this.states[block] === OWNED) return this.owners[block] > 1 ? "shared" : "owned";
    return this.states[block] === EMPTY ? "free" : "cached";
  }

  ownersOf(block) {
    return this.sequences.filter((s) => s.blocks.includes(block));
  }
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
}

/** Follows the feed for ever. show(view) after each picture; away(reason) where there is none: "key", or why. */
export async function follow(view, show, away) {
  for (;;) {
    const reason = await connection(view, show);
    if (reason === UNSEEN) {
      await seen();
      continue;
    }
    await away(reason);
    await new Promise((done) => setTimeout(done, RETRY_MS));
  }
}

/** Until somebody looks at the page. */
function seen() {
  return new Promise((done) => {
    const look = () => {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", look);
      done();
    };
    document.addEventListener("visibilitychange", look);
    look();
  });
}

/** Why it has ended. */
async function connection(view, show) {
  const abort = new AbortController();
  let silence = 0, absence = 0;
  const heard = () => {
    clearTimeout(silence);
    silence = setTimeout(() => abort.abort(`nothing heard for ${SILENT_MS / 1000} s`), SILENT_MS);
  };
  const look = () => {
    clearTimeout(absence);
    if (document.hidden) absence = setTimeout(() => abort.abort(UNSEEN), UNSEEN_MS);
  };
  heard();
  look();
  document.addEventListener("visibilitychange", look);
  try {
    const response = await fetch("page/events", { headers: headers(), cache: "no-store", signal: abort.signal });
    if (!response.ok) return response.status === 401 ? "key" : (await response.json()).error.message;
    await read(response.body, (picture) => {
      view.apply(picture);
      show(view);
    }, heard);
    return "the server has ended the connection";
  } catch (error) {
    if (abort.signal.aborted) return abort.signal.reason;
    if (!(error instanceof TypeError)) console.error(error); // TypeError: the network
    return "the server does not answer";
  } finally {
    clearTimeout(silence);
    clearTimeout(absence);
    document.removeEventListener("visibilitychange", look);
    abort.abort(); // where show() failed, it is still open
  }
}

/** Calls take(object) for each event of a stream, until it ends, and heard() for whatever comes. */
export async function read(body, take, heard = () => {}) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    heard();
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event.startsWith("data: ") && event !== "data: [DONE]") take(JSON.parse(event.slice(6)));
    }
  }
}
