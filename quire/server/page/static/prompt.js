// The prompt box: a request like any other client's, streamed, with the time that it takes.

import { headers, read } from "./feed.js";
import { $, count, duration, make, plural, rate } from "./format.js";

export class Prompt {
  #abort = null;
  #frame = 0;

  /** claim(callId): a request of this page has begun. needKey(): the server asks for one. */
  constructor(claim, needKey) {
    this.claim = claim;
    this.needKey = needKey;
    $("prompt").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    $("prompt-text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("prompt").requestSubmit();
    });
    $("stop").addEventListener("click", () => this.#abort?.abort());
  }

  async #send() {
    if (this.#abort) return;
    const chat = document.querySelector("[name=kind]:checked").value === "chat";
    const text = $("prompt-text").value, n = $("n").valueAsNumber || 1;
    const body = {
      n, temperature: $("temperature").valueAsNumber, max_tokens: $("max-tokens").valueAsNumber || 128,
      stream: true, stream_options: { include_usage: true, continuous_usage_stats: true },
      ...(chat ? { messages: [{ role: "user", content: text }] } : { prompt: text }),
    };
    if (!Number.isFinite(body.temperature)) delete body.temperature;
    const answers = new Answers(n, chat ? "" : lastLines(text));
    const clock = { began: performance.now(), first: null, last: null, usage: null };
    this.#busy(true);
    this.#say("…");
    try {
      const response = await fetch(chat ? "v1/chat/completions" : "v1/completions", {
        method: "POST", headers: headers({ "content-type": "application/json" }), body: JSON.stringify(body), signal: this.#abort.signal,
      });
      if (response.status === 401) this.needKey();
      if (!response.ok) throw new Error((await response.json()).error.message);
      await read(response.body, (event) => {
        if (event.error) throw new Error(event.error.message);
        this.#take(event, answers, clock);
      });
      this.#draw(answers);
      this.#report(clock, "");
    } catch (error) {
      this.#draw(answers);
      if (error.name === "AbortError") this.#report(clock, "stopped; ");
      else this.#say(error.message, true);
    } finally {
      this.#busy(false);
    }
  }

  #take(event, answers, clock) {
    this.claim(event.id);
    clock.last = performance.now();
    for (const choice of event.choices) {
      const text = choice.text ?? choice.delta?.content ?? "", thought = choice.delta?.reasoning ?? "";
      if ((text || thought) && clock.first === null) clock.first = clock.last;
      answers.add(choice.index, text, thought, choice.finish_reason);
    }
    clock.usage = event.usage ?? clock.usage;
    // Tokens come faster than the screen shows them; a layout for each would leave the page no time for anything else.
    this.#frame ||= requestAnimationFrame(() => {
      this.#draw(answers);
      this.#report(clock, "", true);
    });
  }

  #draw(answers) {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    answers.draw();
  }

  #report({ began, first, last, usage }, before, live = false) {
    if (first === null || !usage) return live ? undefined : this.#say(`${before}nothing came`);
    const tokens = usage.completion_tokens, seconds = (last - began) / 1000, cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    const streaming = (last - first) / 1000;
    const speed = streaming > 0 ? (tokens - 1) / streaming : tokens / seconds;
    const parts = [
      ["first token ", duration((first - began) / 1000)], [", ", `${rate(speed)} tokens/s`], [", ", plural(tokens, "token")],
      [" in ", duration(seconds)], ["; ", `${count(cached)} of ${plural(usage.prompt_tokens, "prompt token")}`],
    ];
    const place = $("timing");
    place.className = "timing dim";
    place.setAttribute("aria-live", live ? "off" : "polite"); // read once, at the end
    place.replaceChildren(before, ...parts.flatMap(([word, value]) => [word, make("b", {}, value)]), " from the cache");
  }

  #say(text, bad = false) {
    const place = $("timing");
    place.setAttribute("aria-live", "polite");
    place.className = bad ? "timing bad" : "timing dim";
    place.replaceChildren(text);
  }

  #busy(on) {
    this.#abort = on ? new AbortController() : null;
    $("send").hidden = on;
    $("stop").hidden = !on;
    if (on && document.activeElement === $("send")) $("stop").focus();
    else if (!on && document.activeElement === $("stop")) $("send").focus();
  }
}

/** As much of a prompt as shows where the answer goes on. */
function lastLines(text) {
  const end = text.split("\n").slice(-2).join("\n").slice(-160);
  return end.length < text.length ? `…${end}` : end;
}

/** One box for each sample. */
class Answers {
  constructor(n, prompt) {
    this.boxes = Array.from({ length: n }, (_, i) => {
      const title = n > 1 ? `sample ${i + 1}` : "";
      const box = { title, head: make("h3", {}, title), thought: document.createTextNode(""), text: document.createTextNode(""), more: { thought: "", text: "" }, reason: null };
      const before = [make("span", { className: "prompt-part" }, prompt), make("span", { className: "thought" }, box.thought)];
      box.element = make("div", { className: "answer" }, box.head, make("pre", {}, ...before, box.text));
      box.head.hidden = n === 1;
      return box;
    });
    $("answers").replaceChildren(...this.boxes.map((box) => box.element));
  }

  /** thought: what a model says to itself before it answers. */
  add(index, text, thought, reason) {
    const box = this.boxes[index];
    box.more.text += text;
    box.more.thought += thought;
    box.reason ??= reason;
  }

  /** Show what was added. */
  draw() {
    const place = $("answers"), atEnd = place.scrollTop + place.clientHeight > place.scrollHeight - 8;
    for (const box of this.boxes) {
      for (const [part, more] of Object.entries(box.more)) {
        if (more) box[part].appendData(more);
        box.more[part] = "";
      }
      if (box.reason && !box.head.textContent.includes("ended by")) {
        box.head.hidden = false;
        box.head.textContent = [box.title, `ended by ${box.reason}`].filter(Boolean).join(", ");
      }
    }
    if (atEnd && this.boxes.length === 1) place.scrollTop = place.scrollHeight;
  }
}
