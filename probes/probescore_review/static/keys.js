/** Listens to keys, and lists them all in the help. */

import { byId, fill, make } from "./dom.js";

const OFF = "probescore-review-keys-off";
let everywhere = [];
let ofView = [];
let titleOfView = "";

/**
 * Sets the keys that work in every view.
 * @param {{keys: string[], title: string, run: function(KeyboardEvent): void, shown?: string}[]} list
 */
export function bindEverywhere(list) {
  everywhere = list;
}

/** Sets the keys of the view that is shown now. */
export function bind(title, list) {
  titleOfView = title;
  ofView = list;
}

const named = { " ": "Space", ArrowDown: "↓", ArrowUp: "↑", ArrowLeft: "←", ArrowRight: "→", Escape: "Esc", PageDown: "Page ↓", PageUp: "Page ↑" };
const writes = (target) => target.closest?.("input:not([type=checkbox]):not([type=radio]), textarea, select, [contenteditable]");
const acts = (target) => target.closest?.("button, a[href], summary, input, [role=slider], [role=application]");
const OF_CONTROLS = new Set(["Enter", " ", "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"]);

function keep(wanted) {
  try {
    if (wanted) localStorage.setItem(OFF, "1");
    else localStorage.removeItem(OFF);
  } catch {
    // a browser that keeps nothing: the choice holds until the page is closed
  }
  off = wanted;
}
let off = false;
try {
  off = localStorage.getItem(OFF) !== null;
} catch {
  off = false;
}

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (event.key === "Escape" && writes(event.target)) {
    event.target.blur();
    return;
  }
  if (writes(event.target)) return;
  if (OF_CONTROLS.has(event.key) && acts(event.target)) return;
  const key = event.getModifierState("CapsLock") && event.key.length === 1 ? (event.shiftKey ? event.key.toUpperCase() : event.key.toLowerCase()) : event.key;
  const found = [...ofView, ...everywhere].find((each) => each.keys.includes(key));
  if (!found || (off && event.key.length === 1 && event.key !== " ")) return;
  event.preventDefault();
  if (event.repeat && !found.repeats) return; // a key held down gives one label, not twenty
  found.run(event);
});

function rows(title, list) {
  if (!list.length) return [];
  return [
    make("h3", {}, title),
    make("dl.keys", {}, ...list.flatMap(({ keys, shown, title: what }) => [
      make("dt", {}, ...(shown ?? keys.map((key) => named[key] ?? key)).flatMap((key, index) => (index ? [" ", make("kbd", {}, key)] : [make("kbd", {}, key)]))),
      make("dd", {}, what),
    ])),
  ];
}

/** Shows all keys that work now. */
export function help() {
  const dialog = byId("help");
  const close = make("button", { type: "button", on: { click: () => dialog.close() } }, "Close");
  const single = make("input", { type: "checkbox", checked: off, on: { change: () => keep(single.checked) } });
  fill(dialog, make("h2", { id: "help-title" }, "Keys"),
    make("div.key-columns", {}, make("section", {}, ...rows(titleOfView, ofView)), make("section", {}, ...rows("In every view", everywhere))),
    make("p", {}, make("label", {}, single, " Leave keys of one letter alone (for those who speak to their computer)")),
    make("p.actions", {}, close));
  dialog.showModal();
}
