// Lines and bars as SVG, in coordinates of their own, stretched to the place that they have.

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes = {}) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** A line of the newest values. */
export class Sparkline {
  #values = [];
  #line = svg("path", { class: "spark-line" });
  #area = svg("path", { class: "spark-area" });

  constructor(length = 160) {
    this.length = length;
    this.element = svg("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none", "aria-hidden": "true" });
    this.element.append(this.#area, this.#line);
  }

  add(value) {
    if (!Number.isFinite(value)) return;
    this.#values.push(value);
    if (this.#values.length > this.length) this.#values.shift();
    const top = Math.max(...this.#values) || 1;
    const step = 100 / (Math.max(24, this.#values.length) - 1);
    const from = 100 - (this.#values.length - 1) * step;
    const points = this.#values.map((v, i) => `${(from + i * step).toFixed(2)},${(28 - (v / top) * 24).toFixed(2)}`);
    this.#line.setAttribute("d", `M${points.join("L")}`);
    this.#area.setAttribute("d", `M${from.toFixed(2)},30L${points.join("L")}L100,30Z`);
  }
}

const LABELS = [[0.0001, "0.1 ms"], [0.001, "1 ms"], [0.01, "10 ms"], [0.1, "100 ms"], [1, "1 s"], [10, "10 s"], [100, "100 s"]];
const WIDTH = 320, HEIGHT = 92, BASE = 74;

/** Counts in buckets: time on a logarithmic axis. The first bucket begins at half of its bound, the last one has no end. */
export class Histogram {
  #bars = svg("g");
  #median = svg("line", { class: "median", y1: 2, y2: BASE, visibility: "hidden" });
  #ready = false;

  constructor() {
    this.element = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
    this.element.append(svg("line", { class: "axis", x1: 0, x2: WIDTH, y1: BASE, y2: BASE }), this.#bars, this.#median);
  }

  #x(seconds, bounds) {
    const low = Math.log(bounds[0] / 2), high = Math.log(bounds.at(-1) * 2);
    return Math.max(0, Math.min(WIDTH, ((Math.log(seconds) - low) / (high - low)) * WIDTH));
  }

  #axis(bounds) {
    for (const [seconds, label] of LABELS) {
      if (seconds < bounds[0] || seconds > bounds.at(-1)) continue;
      const text = svg("text", { class: "tick", x: this.#x(seconds, bounds), y: HEIGHT - 3 });
      text.textContent = label;
      this.element.append(text);
    }
    const ends = [0, ...bounds.map((bound) => this.#x(bound, bounds)), WIDTH];
    for (let i = 0; i < ends.length - 1; i++) {
      this.#bars.append(svg("rect", { class: "bar", x: (ends[i] + 0.75).toFixed(2), width: (ends[i + 1] - ends[i] - 1.5).toFixed(2), rx: 1.5 }));
    }
    this.#ready = true;
  }

  show({ bounds_s: bounds, counts, p50 }, label) {
    if (!this.#ready) this.#axis(bounds);
    const top = Math.max(1, ...counts);
    [...this.#bars.children].forEach((bar, i) => {
      const height = counts[i] ? Math.max(2, (counts[i] / top) * (BASE - 6)) : 0;
      bar.setAttribute("y", (BASE - height).toFixed(2));
      bar.setAttribute("height", height.toFixed(2));
    });
    this.#median.setAttribute("visibility", p50 === null ? "hidden" : "visible");
    if (p50 !== null) {
      const x = this.#x(p50, bounds).toFixed(2);
      this.#median.setAttribute("x1", x);
      this.#median.setAttribute("x2", x);
    }
    if (this.element.getAttribute("aria-label") !== label) this.element.setAttribute("aria-label", label);
  }
}
