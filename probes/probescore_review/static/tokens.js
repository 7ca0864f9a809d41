/** Shows the tokens of a completion in the colours of their scores, with their numbers under the pointer, and lets spans be drawn on them. */

import { byId, draw, fill, make, say } from "./dom.js";
import { signed, written } from "./numbers.js";
import { panesOf, placeOn, scaleOf, scoreOf } from "./readings.js";
import { head, oneLine, visible } from "./text.js";

const MOST_TOKENS = 1500;
const LONGEST_TOKEN = 400;
const LONGEST_TEXT = 4000;
const FAINT = 0.06; // nearer to the centre of the scale a score gets no colour
const BINS = 96;
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;

/** Returns nodes with a text of a model; a long one is cut, with a button that shows all of it. */
export function longText(text, longest = LONGEST_TEXT) {
  if (text.length <= longest) return [visible(text)];
  const part = document.createTextNode(visible(head(text, longest)));
  const more = make("button.more", { type: "button" }, `Show all ${text.length.toLocaleString("en")} characters`);
  more.addEventListener("click", (event) => {
    event.stopPropagation();
    part.data = visible(text);
    more.remove();
  });
  return [part, " ", more];
}

/**
 * Shows a completion's tokens in one pane for each reading that is looked at.
 * @param {object} rollout the rollout, as the server tells it, with tokens
 * @param {object|null} probe the probe by whose scores the tokens are coloured; null = no colours
 * @param {string} way the readings that are shown, one of `waysOf(probe)`
 * @param {{spans: number[][], changed: function(number[][]): void}|null} marking where spans can be drawn: those there are, and who is told
 * @returns {{element: HTMLElement, mark: function(number[][]): void}}
 */
export function tokenPanes(rollout, probe, way, marking = null) {
  const panes = probe ? panesOf(probe, way) : [{ reading: null, base: null, title: "" }];
  const element = make("div.panes");
  const texts = [];
  let shown = Math.min(MOST_TOKENS, rollout.tokens.length);
  let held = null; // the token whose number is shown
  let selection = null; // [anchor, end] of the span that is being drawn
  const from = rollout.tokens_from ?? 0; // spans count from the whole completion's begin
  const total = rollout.token_count || rollout.tokens.length;
  let spans = marking?.spans ?? [];

  for (const pane of panes) {
    const scale = probe ? scaleOf(rollout.tokens, probe, pane) : null;
    const text = make("div.text.tokens", { tabindex: 0, role: "group", "aria-label": `Completion${pane.title ? `, ${pane.title}` : ""}: ${rollout.tokens.length} tokens. Arrow keys move from token to token.` });
    if (marking) text.classList.add("marking");
    const legend = scale && make("span.legend", {}, `≤ ${of(pane, scale.centre - scale.reach)} `, make("span.bar"), ` ≥ ${of(pane, scale.centre + scale.reach)}`);
    element.append(make("section.pane", {}, pane.title && make("h3", {}, pane.title, legend), scale && strip(rollout.tokens, probe, pane, scale), text));
    texts.push({ pane, scale, text });
    extend({ pane, scale, text }, 0);
    listen(text);
  }
  if (shown < rollout.tokens.length) {
    const more = make("button.more", { type: "button" }, `Show all ${rollout.tokens.length.toLocaleString("en")} tokens`);
    more.addEventListener("click", () => {
      const first = shown;
      shown = rollout.tokens.length;
      for (const each of texts) extend(each, first);
      more.remove();
    });
    element.append(make("p.after", {}, more));
  }
  paintSpans();

  function extend({ pane, scale, text }, first) {
    const made = [];
    for (let index = first; index < shown; index++) {
      const token = rollout.tokens[index];
      const span = make("span.token", { data: { index } }, ...(token.text === "" ? ["·"] : longText(token.text, LONGEST_TOKEN)));
      if (RIGHT_TO_LEFT.test(head(token.text, LONGEST_TOKEN))) span.classList.add("rtl"); // its neighbours stay where they are
      if (token.counts === false) span.classList.add("masked");
      else if (scale) {
        const place = placeOn(scale, scoreOf(token, probe, pane));
        if (Math.abs(place) >= FAINT) {
          span.classList.add(place > 0 ? "above" : "below");
          span.style.setProperty("--s", Math.abs(place).toFixed(3));
        }
      }
      made.push(span);
    }
    text.append(...made);
    if (first) paintSpans();
  }

  function paintSpans() {
    const marked = new Uint8Array(rollout.tokens.length);
    for (const span of rollout.spans ?? []) {
      const [start, end] = Array.isArray(span) ? span.slice(-2) : [span.start, span.end];
      marked.fill(1, Math.max(0, start - from), Math.max(0, end - from));
    }
    for (const [start, end] of spans) marked.fill(2, Math.max(0, start - from), Math.max(0, end - from));
    if (selection) marked.fill(3, Math.min(...selection), Math.max(...selection) + 1);
    for (const { text } of texts) for (const span of text.children) {
      const mark = marked[span.dataset.index];
      span.classList.toggle("spanned", mark === 1);
      span.classList.toggle("drawn", mark === 2);
      span.classList.toggle("selected", mark === 3);
    }
  }

  function hold(index, text, box) {
    if (held !== null) for (const each of texts) each.text.children[held]?.classList.remove("held");
    held = index;
    const tip = byId("tip");
    if (index === null) {
      tip.hidden = true;
      return;
    }
    for (const each of texts) each.text.children[index]?.classList.add("held");
    const token = rollout.tokens[index];
    const pane = texts.find((each) => each.text === text).pane;
    fill(tip, ...numbers(token, probe, pane),
      make("div", {}, `“${oneLine(head(token.text, 60))}” · token ${from + index + 1} of ${total}`),
      token.counts === false ? make("div", {}, "masked: does not count") : null,
      ...(rollout.spans ?? []).filter((span) => !Array.isArray(span) && span.start <= from + index && from + index < span.end).map((span) => make("div", {}, `in ${span.name}`)));
    tip.hidden = false;
    const size = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 8))}px`;
    tip.style.top = `${box.bottom + 8 + size.height > innerHeight ? Math.max(4, box.top - size.height - 6) : box.bottom + 8}px`;
  }

  function finish() {
    if (!selection) return;
    const span = [from + Math.min(...selection), from + Math.max(...selection) + 1];
    selection = null;
    mark(joined([...spans, span]));
    marking.changed(spans);
    say(`Marked tokens ${span[0] + 1} to ${span[1]}`);
  }

  function mark(wanted) {
    spans = wanted;
    paintSpans();
  }

  function listen(text) {
    const tokenAt = (event) => document.elementFromPoint(event.clientX, event.clientY)?.closest(".token");
    let anchor = null;
    text.addEventListener("pointermove", (event) => {
      const token = event.target.closest?.(".token") && tokenAt(event);
      if (anchor !== null) {
        const at = tokenAt(event);
        if (at && text.contains(at) && (Number(at.dataset.index) !== anchor || selection)) {
          selection = [anchor, Number(at.dataset.index)];
          paintSpans();
        }
      }
      if (token && text.contains(token)) {
        const box = { left: event.clientX + 12, top: event.clientY - 6, bottom: event.clientY + 12 };
        hold(Number(token.dataset.index), text, box);
      }
    });
    text.addEventListener("pointerleave", () => anchor === null && hold(null));
    text.addEventListener("pointerdown", (event) => {
      const token = event.target.closest?.(".token");
      if (!token || event.target.closest("button")) return;
      hold(Number(token.dataset.index), text, token.getBoundingClientRect());
      if (!marking || event.button !== 0) return;
      anchor = Number(token.dataset.index);
      text.setPointerCapture(event.pointerId);
    });
    const release = () => {
      anchor = null;
      finish();
    };
    text.addEventListener("pointerup", release);
    text.addEventListener("pointercancel", () => {
      anchor = selection = null;
      paintSpans();
    });
    text.addEventListener("dblclick", (event) => {
      const token = event.target.closest?.(".token") ?? tokenAt(event);
      if (!marking || !token) return;
      selection = [Number(token.dataset.index), Number(token.dataset.index)];
      finish();
    });
    text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (step !== undefined && shown) {
        event.preventDefault();
        const from = held ?? (step > 0 ? -1 : 0);
        const to = Math.max(0, Math.min(shown - 1, from + step));
        if (marking && event.shiftKey) selection = [selection ? selection[0] : Math.max(0, from), to];
        else selection = null;
        const token = text.children[to];
        token.scrollIntoView({ block: "nearest" });
        hold(to, text, token.getBoundingClientRect());
        say(byId("tip").textContent);
        if (marking) paintSpans();
      } else if (marking && event.key === "Enter" && (selection || held !== null)) {
        event.preventDefault();
        selection ??= [held, held];
        finish();
      } else if (marking && event.key === "Backspace" && held !== null) {
        event.preventDefault();
        mark(spans.filter(([start, end]) => from + held < start || from + held >= end));
        marking.changed(spans);
      } else if (event.key === "Escape" && (held !== null || selection)) {
        event.preventDefault();
        selection = null;
        paintSpans();
        hold(null);
      }
    });
    text.addEventListener("blur", () => hold(null));
  }
  return { element, mark };
}

const of = (pane, number) => (pane.base === null ? written(number) : signed(number));

function numbers(token, probe, pane) {
  if (!probe) return [];
  const score = scoreOf(token, probe, pane);
  const others = probe.readings.length > 1 ? probe.readings.map((reading) => make("div", {}, `${reading} ${written(scoreOf(token, probe, { reading, base: null }))}`)) : [];
  return [make("b", {}, score === null ? "no score" : of(pane, score)), ...others];
}

/** Draws where in a completion the strong scores are. */
function strip(tokens, probe, pane, scale) {
  const bins = Math.min(BINS, tokens.length);
  const svg = draw("svg.strip", { viewBox: `0 0 ${Math.max(1, bins)} 1`, preserveAspectRatio: "none", "aria-hidden": "true" });
  for (let bin = 0; bin < bins; bin++) {
    let strongest = 0;
    for (let index = Math.floor((bin * tokens.length) / bins); index < Math.floor(((bin + 1) * tokens.length) / bins); index++) {
      const place = placeOn(scale, scoreOf(tokens[index], probe, pane));
      if (Math.abs(place) > Math.abs(strongest)) strongest = place;
    }
    if (Math.abs(strongest) < FAINT) continue;
    const cell = draw(strongest > 0 ? "rect.above" : "rect.below", { x: bin, y: 0, width: 1, height: 1 });
    cell.style.setProperty("--s", Math.abs(strongest).toFixed(3));
    svg.append(cell);
  }
  return svg;
}

/** Returns spans in order, with those that touch made one. */
export function joined(spans) {
  const made = [];
  for (const [start, end] of [...spans].sort((a, b) => a[0] - b[0])) {
    const last = made.at(-1);
    if (last && start <= last[1]) last[1] = Math.max(last[1], end);
    else made.push([start, end]);
  }
  return made;
}
