/** One rollout: its prompt, its completion in the colours of any probe and reading, and what else is known of it and of those beside it. */

import { get, ofRun, query } from "./api.js";
import { choice, download, fill, make, say } from "./dom.js";
import { anything, count, written } from "./numbers.js";
import { keyOf, thresholdOf, waysOf } from "./readings.js";
import { badge } from "./rollouts.js";
import { address, go, remember, route } from "./route.js";
import { head, oneLine } from "./text.js";
import { longText, tokenPanes } from "./tokens.js";

export const rollout = {
  title: "One rollout",
  async open(box, run, place) {
    const told = await get(ofRun(run.run, "rollouts", place.item) + query({ part: place.settings.part }));
    const state = { probe: place.settings.probe ?? "", way: place.settings.way ?? "" };
    const around = neighboursIn(run, place);
    const tokens = make("div");
    const followUps = make("div.follow-ups");
    const controls = make("div.controls");
    const probes = run.probes;
    const probe = () => probes.find((each) => each.key === state.probe) ?? probes[0] ?? null;
    const way = () => {
      const ways = probe() ? waysOf(probe()) : [];
      return ways.includes(state.way) ? state.way : ways[0];
    };

    function paint() {
      const ways = probe() ? waysOf(probe()) : [];
      fill(controls,
        probes.length ? make("label.field", {}, "Probe ", choice(probes.map((each) => [each.key, each.key]), probe().key, (key) => look({ probe: key }), { "aria-keyshortcuts": "p" })) : null,
        ways.length > 1 ? make("label.field", {}, "Reading ", choice(ways.map((each) => [each, each]), way(), (each) => look({ way: each }), { "aria-keyshortcuts": "r" })) : null,
        make("span.spacer"), make("button", { type: "button", on: { click: save } }, "Export as JSONL"), around.buttons);
      fill(followUps, ...(told.follow_ups ?? []).map((each) => followUpOf(each, probe(), way())));
      fill(tokens, partsOf(told, (part) => go(run.run, "rollout", place.item, { ...route().settings, part: String(part) })), completionOf(told, probe(), way()));
    }
    function look(change) {
      Object.assign(state, change);
      remember(state);
      paint();
    }
    const save = () => download(`${run.name}-${told.rollout}`, [told]);
    const turn = (by) => {
      const ways = probe() ? waysOf(probe()) : [];
      if (!ways.length) return;
      look({ way: ways[(ways.indexOf(way()) + by + ways.length) % ways.length] });
      say(way());
    };
    paint();
    fill(box,
      make("div.head", {}, make("h2.foreign", {}, `Step ${anything(told.step)}`, make("span.note", {}, ` ${oneLine(head(String(told.name ?? told.rollout), 120))}`)), factsOf(told, run)),
      controls,
      told.said && make("p.note", {}, told.said),
      make("div.two", {},
        make("div", {},
          make("section.card", {}, make("h3", {}, "Prompt"), promptOf(told.prompt)),
          make("section.card", {}, make("h3", {}, "Completion"), tokens),
          ...(told.follow_ups?.length ? [make("section.card", {}, make("h3", {}, "Follow-ups"), followUps)] : [])),
        make("aside", { "aria-label": "About this rollout" }, ...asideOf(told, run))));
    return { keys: [
      { keys: ["j", "ArrowRight"], title: "Next rollout of the list", run: () => around.to(1) },
      { keys: ["k", "ArrowLeft"], title: "Rollout of the list before", run: () => around.to(-1) },
      { keys: ["p"], title: "Colour by the next probe", run: () => probes.length && (look({ probe: probes[(probes.indexOf(probe()) + 1) % probes.length].key }), say(probe().key)) },
      { keys: ["r"], title: "Next reading: side by side, one of them, a difference", run: () => turn(1) },
      { keys: ["R"], title: "Reading before", run: () => turn(-1) },
      { keys: ["t"], title: "Go to the tokens (then ← and →)", run: () => box.querySelector(".tokens")?.focus() },
      { keys: ["l"], title: "Label this rollout", run: () => go(run.run, "label", told.rollout) },
      { keys: ["x"], title: "Export this rollout", run: save },
      { keys: ["b", "Backspace"], title: "Back to the list", run: () => around.back() },
    ] };
  },
};

/** Returns the ways from a rollout to those before and after it in the list that it was opened from. */
function neighboursIn(run, place) {
  const { list, at, suspicious } = place.settings;
  const index = Number.parseInt(at ?? "", 10);
  const view = suspicious ? "suspicious" : "rollouts";
  let asked = {};
  try {
    asked = JSON.parse(list ?? "{}");
  } catch {
    asked = {}; // not written by this page
  }
  const home = suspicious ? address(run.run, view, null, { list: suspicious, at }) : address(run.run, view, null, { ...asked, at });
  const knows = Number.isInteger(index) && (list || suspicious);
  async function to(by) {
    const next = index + by;
    if (!knows || next < 0) return say("This is the end of the list");
    const rows = suspicious
      ? ((await get(ofRun(run.run, "suspicious"))).lists.find((each) => each.id === suspicious)?.rows ?? []).slice(next, next + 1)
      : (await get(ofRun(run.run, "rollouts") + query({ ...asked, offset: String(next), limit: "1" }))).rows;
    if (!rows.length) return say("This is the end of the list");
    const settings = { ...(suspicious ? { suspicious } : { list }), at: String(next), probe: route().settings.probe, way: route().settings.way };
    location.replace(address(run.run, "rollout", rows[0].rollout, settings)); // back leads to the list, not through every rollout
  }
  const buttons = make("span.around", {}, make("a", { href: home }, "Back to the list"),
    knows ? make("button", { type: "button", disabled: index === 0, on: { click: () => to(-1) } }, "← Before") : null,
    knows ? make("button", { type: "button", on: { click: () => to(1) } }, "Next →") : null);
  return { buttons, to, back: () => (location.hash = home) };
}

/** Returns a completion: its tokens in colours, or its text where there are none. */
export function completionOf(told, probe, way, marking = null) {
  if (told.tokens?.length) return tokenPanes(told, probe, way, marking).element;
  if (told.completion === null || told.completion === undefined) return make("p.note", {}, told.said ?? "The record keeps no text of it.");
  return make("div", {}, make("div.text", {}, ...longText(told.completion)), make("p.note", {}, "There are no scores per token."));
}

/** Returns the ways to the parts of a completion that is too long to be shown at once; null if it is not. */
export function partsOf(told, turn) {
  if (!(told.parts > 1)) return null;
  const to = (part, text) => make("button", { type: "button", disabled: part < 0 || part >= told.parts, on: { click: () => turn(part) } }, text);
  return make("p.actions", {}, `Part ${told.part + 1} of ${told.parts}`, to(told.part - 1, "← Part before"), to(told.part + 1, "Next part →"));
}

/** Returns a prompt: a text, or messages with their roles. */
export function promptOf(prompt) {
  if (prompt === null || prompt === undefined) return make("p.note", {}, "The record keeps no text of it.");
  if (typeof prompt === "string") return make("div.text.context", {}, ...longText(prompt, 1500));
  return make("div", {}, ...prompt.map((message) => make("div.message", {}, make("span.role", {}, oneLine(head(String(message.role ?? ""), 40))), make("div.text.context", {}, ...longText(String(message.text ?? message.content ?? ""), 1500)))));
}

function factsOf(told, run) {
  const facts = [];
  const add = (name, value) => value !== null && value !== undefined && facts.push(make("span", {}, `${name} `, make("b.number", {}, anything(value))));
  add("task reward", told.task_reward);
  add("total reward", told.total_reward);
  add("tokens", told.token_count || null);
  add("log-probability", told.logprob);
  return make("p.facts", {}, ...facts, scoresBadge(told, run), told.label ? badge(told.label) : null);
}

function scoresBadge(told, run) {
  const over = run.probes.filter((probe) => {
    const threshold = thresholdOf(probe), score = threshold && told.scores?.[probe.key]?.frozen?.[threshold.reduction];
    return typeof score === "number" && score >= threshold.value;
  });
  return over.length ? make("span.badge.flagged", {}, `flagged by ${over.map((probe) => probe.key).join(", ")}`) : null;
}

/** Returns a table of a rollout's scores: a row for each probe and reduction, a column for each reading. */
export function scoresOf(scores, thresholds) {
  const readings = [...new Set(Object.values(scores ?? {}).flatMap((of) => Object.keys(of ?? {})))];
  if (!readings.length) return make("p.note", {}, "No scores.");
  const rows = Object.entries(scores).flatMap(([key, of]) => {
    const reductions = [...new Set(Object.values(of ?? {}).flatMap((each) => Object.keys(each ?? {})))];
    return reductions.map((reduction) => make("tr", {}, make("th.foreign", { scope: "row" }, `${key} ${reduction}`), ...readings.map((reading) => {
      const value = of[reading]?.[reduction], threshold = thresholds?.[key]?.[reading]?.[reduction];
      const known = typeof threshold === "number" && typeof value === "number";
      return make(`td.number${known && value >= threshold ? ".flagged" : ""}`, { title: known ? `flagged from ${written(threshold)} on` : null }, typeof value === "number" ? written(value) : anything(value));
    })));
  });
  return make("div.scroll", { tabindex: 0, role: "group", "aria-label": "Scores" }, make("table", {}, make("thead", {}, make("tr", {}, make("td", {}), ...readings.map((reading) => make("th.number.foreign", { scope: "col" }, reading)))), make("tbody", {}, ...rows)));
}

function asideOf(told, run) {
  const parts = [make("section.card", {}, make("h3", {}, "Scores"), scoresOf(told.scores, told.thresholds))];
  if (told.spans?.length) parts.push(make("section.card", {}, make("h3", {}, "Spans"), make("ul.plain-list", {}, ...told.spans.map((span) => make("li", {}, Array.isArray(span) ? `tokens ${span[0] + 1} to ${span[1]}` : `${span.name}: tokens ${span.start + 1} to ${span.end}`, span.scores ? make("span.note", {}, ` ${anything(span.scores)}`) : null)))));
  parts.push(make("section.card", {}, make("h3", {}, "Labels"), told.labels?.length
    ? make("ul.plain-list", {}, ...told.labels.map((label) => make("li", {}, badge(label.label), ` by ${oneLine(head(String(label.labeller ?? "?"), 60))}`, make("span.note", {}, ` ${whenOf(label.when)}${label.second ? " · second judgement" : ""}${label.undone ? " · undone" : ""}`), label.note ? make("p.foreign", {}, ...longText(label.note, 400)) : null, label.spans?.length ? make("p.note", {}, `spans: ${label.spans.map(([start, end]) => `tokens ${start + 1} to ${end}`).join(", ")}`) : null)))
    : make("p.note", {}, "None yet."), make("p", {}, make("a", { href: address(run.run, "label", told.rollout) }, "Label this rollout"))));
  const lists = [["Same group", told.group, "task_reward"], ["Same prompt at other steps", told.same_prompt, "step"], ["Nearest by activation", told.neighbours, "similarity"]];
  for (const [title, rows, first] of lists) if (rows?.length) parts.push(make("section.card", {}, make("h3", {}, `${title} `, make("span.note", {}, count(rows.length))), make("ul.others", {}, ...rows.map((row) => otherOf(run, row, first, told.rollout)))));
  return parts;
}

function otherOf(run, row, first, self) {
  const main = mainScore(row, run);
  const facts = [first !== "step" ? null : `step ${anything(row.step)}`, first === "similarity" ? `similarity ${anything(row.similarity)} · step ${anything(row.step)}` : null, row.task_reward !== undefined && row.task_reward !== null ? `reward ${written(row.task_reward)}` : null, main].filter(Boolean);
  const own = row.rollout === self;
  return make("li", {}, make("a", { href: address(run.run, "rollout", row.rollout), "aria-current": own ? "true" : null }, make("span.number", {}, own ? "this one · " : "", facts.join(" · ")), row.label ? badge(row.label) : null, make("span.snippet", {}, oneLine(head(row.snippet ?? String(row.rollout), 160)))));
}

function mainScore(row, run) {
  const probe = run.probes[0];
  if (!probe) return null;
  const of = row.scores?.[probe.key];
  const frozen = of && typeof of === "object" ? Object.values(of.frozen ?? {})[0] : row.scores?.[`${probe.key}:frozen`] ?? row[`score:${probe.key}:frozen`];
  return typeof frozen === "number" ? `${probe.key} ${written(frozen)}` : null;
}

/** Returns a follow-up (what was appended to the completion, and read after it), with its tokens in colours where there are any. */
function followUpOf(each, probe, way) {
  const scores = Object.entries(each.token_scores ?? {}).flatMap(([key, of]) => Object.entries(of).map(([reading, values]) => [keyOf(key, reading), values]));
  const tokens = (each.pieces ?? []).map((text, index) => ({ text, scores: Object.fromEntries(scores.map(([name, values]) => [name, values[index] ?? null])) }));
  return make("div.follow-up", {}, completionOf({ tokens, completion: each.text }, probe, way), each.scores ? scoresOf(each.scores) : null);
}

/** Returns a time, given in seconds since 1970 or as text, for people. */
export function whenOf(when) {
  const date = typeof when === "number" ? new Date(when * 1000) : new Date(when ?? NaN);
  return Number.isNaN(date.getTime()) ? String(when ?? "") : date.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

