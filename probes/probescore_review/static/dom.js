/** Builds elements. Text is only ever set as text, never as markup, and what cannot be seen in it is spelt out. */

import { spelt } from "./text.js";

const SVG = "http://www.w3.org/2000/svg";

/**
 * Returns a new element.
 * @param {string} name name of the element, with classes after dots: "div.card.wide"
 * @param {object} [properties] attributes; `on` = listeners by the name of the event; `data` = dataset; true and false set or leave out
 * @param {...(Node|string|number|null)} children elements, or texts; null is left out
 */
export function make(name, properties = {}, ...children) {
  return built(document.createElement(name.split(".")[0]), name, properties, children);
}

/** Returns a new element of a drawing (SVG), as `make` does. */
export function draw(name, properties = {}, ...children) {
  return built(document.createElementNS(SVG, name.split(".")[0]), name, properties, children);
}

function built(element, name, { on = {}, data = {}, class: more, ...attributes }, children) {
  for (const each of [...name.split(".").slice(1), ...(more ? more.split(" ") : [])]) element.classList.add(each);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, key.startsWith("aria-") || key === "title" ? spelt(value) : value);
  }
  for (const [event, listener] of Object.entries(on)) element.addEventListener(event, listener);
  for (const [key, value] of Object.entries(data)) element.dataset[key] = value;
  element.append(...nodes(children));
  return element;
}

/** Returns children as nodes: texts with their invisible characters spelt out, without nulls. */
export function nodes(children) {
  return children.flat().filter((each) => each !== null && each !== undefined && each !== false).map((each) => (each instanceof Node ? each : document.createTextNode(spelt(each))));
}

/** Puts children into an element, in place of what it had. */
export function fill(element, ...children) {
  element.replaceChildren(...nodes(children));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Says a sentence to those who listen to the page. */
export function say(sentence) {
  byId("said").textContent = spelt(sentence);
}

/** Shows a sentence about something that went wrong, until it is dismissed or another one comes; null takes it away. */
export function alarm(sentence) {
  if (sentence === null) return fill(byId("alarm"));
  return fill(byId("alarm"), make("p", {}, sentence), make("button.plain", { type: "button", on: { click: () => alarm(null) } }, "Dismiss"));
}

/** Returns a select element. */
export function choice(options, chosen, change, properties = {}) {
  const select = make("select", { ...properties, on: { change: () => change(select.value) } });
  for (const [value, title] of options) select.append(make("option", { value, selected: value === chosen }, title));
  return select;
}

const KEPT_MS = 60_000;

/** Gives the user a file with a line of JSON for each of some rows. */
export function download(name, rows) {
  const url = URL.createObjectURL(new Blob(rows.map((row) => `${JSON.stringify(row)}\n`), { type: "application/x-ndjson" }));
  make("a", { href: url, download: `${name.replace(/[^\p{L}\p{N}._-]+/gu, "-")}.jsonl` }).click();
  setTimeout(() => URL.revokeObjectURL(url), KEPT_MS);
}
