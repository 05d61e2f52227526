// Numbers as people read them, and elements made of parts.

const grouped = new Intl.NumberFormat("en");

export const count = (n) => grouped.format(Math.round(n));

export function plural(n, one, many = one + "s") {
  return `${count(n)} ${n === 1 ? one : many}`;
}

export function percent(share) {
  if (!Number.isFinite(share)) return "–";
  const value = share * 100;
  return `${value === 0 || value >= 10 ? value.toFixed(0) : value.toFixed(1)} %`;
}

/** Seconds: 0.4 ms, 38 ms, 1.25 s, 3 min. */
export function duration(s) {
  if (s === null || s === undefined || !Number.isFinite(s)) return "–";
  if (s < 0.01) return `${(s * 1000).toFixed(1)} ms`;
  if (s < 1) return `${(s * 1000).toFixed(0)} ms`;
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 120) return `${s.toFixed(0)} s`;
  if (s < 7200) return `${(s / 60).toFixed(0)} min`;
  return `${(s / 3600).toFixed(0)} h`;
}

export function rate(n) {
  if (n === null || n === undefined || !Number.isFinite(n)) return "–";
  return n > 0 && n < 10 ? n.toFixed(1) : count(n);
}

/** cmpl-0123456789abcdef01234567-0 → 234567-0; the whole id is in the title. */
export function shortId(id) {
  return id.length > 14 ? id.replace(/^([a-z]+-)?.*(.{8})$/, "$1…$2") : id;
}

/** An element: make("b", {className: "x"}, "text", other). */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Sets text only where it is another: an unchanged live region is not read again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const $ = (id) => document.getElementById(id);
