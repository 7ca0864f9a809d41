/** The overview: what the audit says of each probe, and its numbers by step, of one run or of several side by side. */

import { get, ofRun, query } from "./api.js";
import { chart, colourOf, rangeOf } from "./chart.js";
import { alarm, download, fill, make } from "./dom.js";
import { anything, count, share, written } from "./numbers.js";
import { address, go, remember } from "./route.js";

const GOOD = ["behaviour changed", "no change"];
const DOUBTFUL = ["behaviour rose", "false alarms up", "cannot tell", "threshold moved"];
const gradeOf = (verdict) => (GOOD.includes(verdict) ? "good" : !verdict || DOUBTFUL.includes(verdict) ? "doubtful" : "bad");

export const overview = {
  title: "Overview",
  slow: "The record is being audited. With many rollouts this takes a minute, once.",
  async open(box, run, place, runs) {
    const beside = new Set((place.settings.beside ?? "").split(",").filter((each) => each && each !== run.run && runs.some((other) => other.run === each)));
    const known = new Map();
    for (const each of (await get("api/runs")).runs) Object.assign(runs.find((other) => other.run === each.run) ?? {}, each); // labels were given, the run went on
    const about = make("div.columns");
    const plots = make("div");

    let closed = false;

    /** Reads what is known of a run at once, and shows what its audit says when it has ended. */
    async function read(each) {
      if (known.has(each.run)) return;
      const told = await get(ofRun(each.run, "overview") + query({ wait: "0" }));
      known.set(each.run, told);
      if (told.pending) {
        get(ofRun(each.run, "overview")).then((audited) => {
          known.set(each.run, audited);
          if (!closed) return paint();
        }).catch((problem) => {
          if (!closed) alarm(problem.message);
        });
      }
    }

    async function paint() {
      const shown = runs.filter((each) => each.run === run.run || beside.has(each.run));
      await Promise.all(shown.map(read));
      for (const each of [about, plots]) each.style.setProperty("--columns", shown.length);
      about.classList.toggle("single", shown.length === 1);
      const focused = document.activeElement?.closest?.(".plot")?.getAttribute("aria-label");
      fill(about, ...shown.map((each) => columnOf(each, known.get(each.run))));
      fill(plots, ...plotsOf(shown, known), ...shown.flatMap((each) => restOf(each, known.get(each.run), shown.length > 1)));
      if (focused) plots.querySelector(`.plot[aria-label="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
    }

    const boxes = runs.length > 1 && make("fieldset.beside", {}, make("legend", {}, "Side by side with"), ...runs.filter((each) => each.run !== run.run).map((each) => {
      const tick = make("input", { type: "checkbox", checked: beside.has(each.run) });
      tick.addEventListener("change", async () => {
        if (tick.checked) beside.add(each.run);
        else beside.delete(each.run);
        remember({ beside: [...beside].join(",") });
        await paint();
      });
      return make("label", {}, tick, " ", each.name);
    }));
    await paint();
    fill(box, boxes, about, plots);
    const save = () => runs.filter((each) => known.has(each.run) && (each.run === run.run || beside.has(each.run))).forEach((each) => download(`${each.name}-overview`, [{ run: each.name, ...known.get(each.run) }]));
    return { close: () => (closed = true), keys: [
      { keys: ["x"], title: "Export these numbers and verdicts", run: save },
      { keys: ["v"], title: "Go to the next plot (then arrow keys, and Enter for the rollouts of a point)", run: () => nextPlot(box, 1) },
      { keys: ["V"], title: "Go to the plot before", run: () => nextPlot(box, -1) },
    ] };
  },
};

function nextPlot(box, by) {
  const every = [...box.querySelectorAll(".plot[tabindex]")];
  if (every.length) every[(every.indexOf(document.activeElement) + by + every.length + (by < 0 && !every.includes(document.activeElement) ? 1 : 0)) % every.length].focus();
}

function columnOf(run, told) {
  const facts = [`${count(run.rollouts)} rollouts`, run.steps?.length ? `steps ${run.steps[0]} to ${run.steps[1]}` : null, `${count(run.labelled)} labelled`, run.live ? "goes on" : null];
  return make("div.column", {},
    make("section.card", {}, make("h2.foreign", {}, run.name), make("p.note", {}, facts.filter(Boolean).join(" · ")),
      !run.has_texts && make("p.note", {}, "The record keeps no texts of this run."),
      make("p.links", {}, make("a", { href: address(run.run, "suspicious") }, "What looks suspicious"), make("a", { href: address(run.run, "rollouts") }, "All rollouts"), make("a", { href: address(run.run, "label") }, "Label"), make("button.more", { type: "button", on: { click: () => download(`${run.name}-overview`, [{ run: run.name, ...told }]) } }, "Export as JSONL"))),
    ...(told.verdicts ?? []).map((each) => verdictOf(run, each)),
    !told.verdicts?.length ? make("section.card.verdict.doubtful", {}, make("h2", {}, told.pending ? "The record is being audited …" : "No verdict"), make("p", {}, told.said ?? (told.pending ? "With many rollouts this takes a minute, once." : "The audit says nothing of this run."))) : (told.said || told.pending) && make("p.note", {}, told.pending ? "The record is being audited again …" : told.said));
}

function verdictOf(run, { probe, reading, verdict, sentence, what_to_do: todo, alarms = [], labels, unknown = [] }) {
  const grade = alarms.length ? "bad" : gradeOf(verdict);
  return make(`section.card.verdict.${grade}`, {},
    make("p.note.foreign", {}, `${probe} · ${reading}${typeof labels === "number" ? ` · ${count(labels)} labels` : ""}`),
    make("h2", {}, make("span.word", {}, verdict ?? "no verdict yet")),
    make("p", {}, sentence),
    unknown.length ? make("details", {}, make("summary", {}, `What is not known: ${unknown.length}`), make("ul", {}, ...unknown.map((each) => make("li", {}, anything(each))))) : null,
    todo?.length ? make("p", {}, make("b", {}, "What to do: "), [todo].flat().join(" ")) : null,
    alarms.length ? make("p", {}, "Alarms at ", ...alarms.slice(0, 12).flatMap((step, index) => [index ? ", " : "", make("a", { href: atStep(run, probe, reading, step) }, `step ${step}`)]), alarms.length > 12 ? ` and ${alarms.length - 12} more` : ".") : null);
}

/** Returns the settings of the table with the rollouts of a step, or of the steps that a point stands for. */
const settingsAt = (probe, reading, step, last = step) => ({ where: JSON.stringify(last === step ? [["step", "=", step]] : [["step", ">=", step], ["step", "<=", last]]), ...(probe && reading ? { sort: `score:${probe}:${reading}`, descending: "1" } : {}) });
const atStep = (run, probe, reading, step) => address(run.run, "rollouts", null, settingsAt(probe, reading, step));

/** Returns the plots: one row for each name and probe, one column for each run, all of a row with the same axes. */
function plotsOf(shown, known) {
  const rows = new Map();
  for (const run of shown) for (const series of known.get(run.run).series ?? []) {
    const key = JSON.stringify([series.name, series.probe ?? ""]);
    if (!rows.has(key)) rows.set(key, { name: series.name, probe: series.probe, unit: series.unit, level: series.level_title ?? "level", of: new Map() });
    const of = rows.get(key).of;
    of.set(run.run, [...(of.get(run.run) ?? []), series]);
  }
  const steps = [...rows.values()].flatMap((row) => [...row.of.values()].flat().flatMap((series) => series.steps));
  const xRange = [steps.reduce((a, b) => Math.min(a, b), Infinity), steps.reduce((a, b) => Math.max(a, b), -Infinity)];
  return [make("div.plots", {}, ...[...rows.values()].map((row) => {
    const levels = [...row.of.values()].flat().map((series) => series.level).filter((level) => typeof level === "number");
    const yRange = rangeOf([...row.of.values()].flat(), levels);
    const readings = [...new Set([...row.of.values()].flat().map((series) => series.reading ?? ""))];
    const text = row.unit === "share" ? share : written;
    return make("section.card.row", {},
      make("h2.foreign", {}, row.probe ? `${row.name}: ${row.probe}` : row.name),
      make("p.legend-line", {}, ...readings.filter(Boolean).map((reading) => make(`span.key.${colourOf(readings.indexOf(reading))}`, {}, reading)), levels.length ? make("span.key.line.soft", {}, row.level) : null),
      make("div.columns", {}, ...shown.map((run) => figure(run, row, row.of.get(run.run) ?? [], known.get(run.run), { readings, xRange, yRange, text, several: shown.length > 1 }))));
  }))];
}

function figure(run, row, list, told, { readings, xRange, yRange, text, several }) {
  const alarms = [...new Set((told.verdicts ?? []).filter((each) => each.probe === row.probe).flatMap((each) => each.alarms ?? []))];
  const curves = list.map((series) => ({ ...series, title: series.reading ?? row.name, colour: colourOf(readings.indexOf(series.reading ?? "")) }));
  const drawn = chart({
    title: `${row.name}${row.probe ? ` of ${row.probe}` : ""} by step, ${run.name}`, curves, xRange, yRange, text, marks: alarms.slice(0, 20),
    levels: [...new Set(list.map((series) => series.level).filter((level) => typeof level === "number"))],
    pick: (curve, step) => go(run.run, "rollouts", null, settingsAt(curve.probe, curve.reading, ...stepsOf(told, curve, step))),
  });
  return make("figure", {}, several && make("figcaption.foreign", {}, run.name), drawn, curves.length ? numbersOf(run, told, curves, text) : null);
}

/** Returns the first and last step that a point stands for: one step, a bin of steps, or a window of the audit, which is drawn at its end. */
function stepsOf(told, curve, step) {
  if (curve.steps_each) return [step, step + curve.steps_each - 1];
  const window = (told.decomposition ?? []).filter((each) => each.probe === curve.probe && each.reading === curve.reading).flatMap((each) => each.windows).find((each) => each.last_step === step);
  return window ? [window.first_step, window.last_step] : [step, step];
}

function numbersOf(run, told, curves, text) {
  const details = make("details", {}, make("summary", {}, "Numbers"));
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector("table")) return;
    const steps = [...new Set(curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
    const cell = (curve, step) => {
      const index = curve.steps.indexOf(step);
      if (index < 0) return "–";
      const band = curve.low?.[index] !== undefined && curve.low[index] !== null ? ` (${text(curve.low[index])} to ${text(curve.high[index])})` : "";
      return `${text(curve.value[index])}${band}`;
    };
    details.append(make("div.scroll", { tabindex: 0, role: "group", "aria-label": "Numbers of this plot" }, make("table", {},
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "step"), ...curves.map((curve) => make("th", { scope: "col" }, curve.title)))),
      make("tbody", {}, ...steps.map((step) => make("tr", {}, make("th", { scope: "row" }, make("a", { href: address(run.run, "rollouts", null, settingsAt(curves[0].probe, curves[0].reading, ...stepsOf(told, curves[0], step))) }, String(step))), ...curves.map((curve) => make("td", {}, cell(curve, step)))))))));
  });
  return details;
}

/** Returns what the audit says beside its verdicts and plots: what became of the behaviour, and what all of it assumes. */
function restOf(run, told, several) {
  const title = (text) => (several ? `${text}: ${run.name}` : text);
  const parts = [];
  for (const each of told.decomposition ?? []) if (each.windows?.length) parts.push(partsOf(each, title(`Why the flagged share changed: ${each.probe} on ${each.reading}`)));
  for (const [name, list] of [["Notices", told.notices], ["Left out", told.left_out]]) if (list?.length) parts.push(make("section.card", {}, make("h2.foreign", {}, title(name)), make("ul", {}, ...list.map((each) => make("li", {}, anything(each))))));
  if (told.assumptions?.length) parts.push(make("section.card", {}, make("h2.foreign", {}, title("What this assumes")), make("ul", {}, ...told.assumptions.map((each) => make("li", {}, typeof each === "string" ? each : anything(each))))));
  return parts;
}

/** Returns what the change of the flagged share is made of, by window of steps. */
function partsOf(each, title) {
  const point = (number) => `${number > 0 ? "+" : ""}${(100 * number).toFixed(1)}`.replace("-", "−");
  const points = (part) => (part && typeof part.value === "number" ? `${point(part.value)} (${point(part.low)} to ${point(part.high)})` : "–");
  const names = [["composition", "more or fewer with the behaviour"], ["positives", "recall"], ["negatives", "false alarms"]];
  return make("section.card", {}, make("h2.foreign", {}, title), make("p.note", {}, "Percentage points since before training, with 95% intervals."),
    make("div.scroll", { tabindex: 0, role: "group", "aria-label": title }, make("table", {}, make("thead", {}, make("tr", {}, ...["steps", "labels", ...names.map(([, text]) => text)].map((text) => make("th", { scope: "col" }, text)))),
      make("tbody", {}, ...each.windows.map((window) => make("tr", {}, make("th", { scope: "row" }, `${window.first_step} to ${window.last_step}`), make("td", {}, anything(window.labels)), ...names.map(([name]) => make("td", {}, points(window[name])))))))));
}

/** Returns a table of rows of the same names, or a list of names and values. */
export function tableOf(value) {
  const rows = Array.isArray(value) ? value : [];
  if (rows.length && rows.every((row) => row && typeof row === "object" && !Array.isArray(row))) {
    const names = [...new Set(rows.flatMap((row) => Object.keys(row)))];
    return make("div.scroll", { tabindex: 0, role: "group", "aria-label": "Table" }, make("table", {}, make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name.replaceAll("_", " "))))), make("tbody", {}, ...rows.map((row) => make("tr", {}, ...names.map((name) => make("td", {}, anything(row[name]))))))));
  }
  if (value && typeof value === "object" && !Array.isArray(value)) {
    return make("dl.facts-list", {}, ...Object.entries(value).flatMap(([name, each]) => [make("dt", {}, name.replaceAll("_", " ")), make("dd", {}, each && typeof each === "object" && !(Array.isArray(each) && each.every((part) => typeof part !== "object")) ? tableOf(each) : anything(each))]));
  }
  return make("p", {}, anything(value));
}
