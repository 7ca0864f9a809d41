/** Repair: what is done with the labels, step by step, each with the command that does it, what that writes, and what came out. */

import { change, get, getIfThere, ofRun } from "./api.js";
import { alarm, choice, fill, make, say } from "./dom.js";
import { anything } from "./numbers.js";
import { tableOf } from "./overview.js";
import { address, remember } from "./route.js";
import { head, oneLine } from "./text.js";

const STEPS = [
  { step: "audit", title: "Audit again", help: "What the audit says with the labels that there are now." },
  { step: "recalibrate", title: "Recalibrate", help: "A new version of the probe file, whose threshold comes from the new labels. Shows the old threshold beside the new one, and what it flags differently on the record." },
  { step: "refit", title: "Refit", help: "A new probe, fitted with the new labels." },
  { step: "compare", title: "Compare", help: "The old probe and the new one on labels that neither has seen, and on the anchors." },
  { step: "replace", title: "Replace it live", help: "Copies the new probe file into the folder that the server follows. A trainer that asks for the probe by its bare name goes on with the new one." },
  { step: "discard", title: "Discard", help: "Deletes the new probe file. What is served stays as it is." },
];
const POLL_MS = 700;
const LONGEST_OUTPUT = 60_000;
const APART = new Set(["old", "new", "sentence", "differently", "rows"]);

export const repair = {
  title: "Repair",
  async open(box, run, place) {
    const told = await getIfThere(ofRun(run.run, "repair"));
    const steps = told?.steps ?? STEPS;
    const known = (await getIfThere(ofRun(run.run, "jobs")))?.jobs ?? [];
    const cards = steps.map((step) => new Step(run, { ...STEPS.find((each) => each.step === step.step), ...step }, async () => {
      const now = await getIfThere(ofRun(run.run, "repair")).catch(() => null); // a new probe can be chosen now
      for (const card of cards) card.offer(now?.steps?.find((each) => each.step === card.step.step) ?? {});
    }));
    fill(box, told?.said && make("p.note", {}, told.said), make("ol.steps", {}, ...cards.map((card) => card.element)));
    for (const card of cards) {
      const job = place.settings[card.step.step] ?? known.find((each) => each.step === card.step.step)?.job;
      if (job !== undefined) card.follow(String(job));
    }
    const at = () => cards.findIndex((card) => card.element.contains(document.activeElement));
    const move = (by) => cards[Math.max(0, Math.min(cards.length - 1, at() < 0 ? 0 : at() + by))].run.focus();
    return {
      close: () => cards.forEach((card) => card.close()),
      keys: [
        { keys: ["j", "ArrowDown"], title: "Next step", run: () => move(1) },
        { keys: ["k", "ArrowUp"], title: "Step before", run: () => move(-1) },
        { keys: ["Enter"], title: "Run the step that has the focus", run: () => cards[at()]?.run.click() },
      ],
    };
  },
};

/** One step: its options, and the job that does it. */
class Step {
  constructor(run, step, done) {
    Object.assign(this, { of: run, step, done, closed: false, timer: null, values: {}, chosen: new Set() });
    this.options = make("div.options");
    this.run = make("button.primary", { type: "submit" }, step.title);
    this.body = make("div.job", { "aria-live": "polite" });
    this.element = make("li.card", {}, make("form", { on: { submit: (event) => {
      event.preventDefault();
      this.begin();
    } } }, make("h2", {}, step.title), make("p", {}, step.help), step.said ? make("p.note", {}, step.said) : null, step.command ? make("p", {}, make("code", {}, step.command)) : null, this.options, make("p.actions", {}, this.run)), this.body);
    this.offer(step);
  }

  /** Shows what a step can be asked for now; what somebody has chosen stays chosen while it can be. */
  offer({ options, ready }) {
    if (options) {
      for (const each of options) {
        const still = this.chosen.has(each.name) && (each.kind !== "choice" || each.choices.includes(this.values[each.name]));
        if (!still) this.values[each.name] = each.value ?? null;
      }
      fill(this.options, ...options.filter((each) => each.kind !== "choice" || each.choices.length).map((option) => this.option({ ...option, value: this.values[option.name] })));
    }
    if (ready !== undefined) this.ready = ready;
    this.run.disabled = this.ready === false || this.state === "running";
  }

  option(option) {
    const id = `${this.step.step}-${option.name}`;
    const set = (value) => {
      this.values[option.name] = value;
      this.chosen.add(option.name);
    };
    const field = option.kind === "choice" ? choice((option.choices ?? []).map((each) => (Array.isArray(each) ? each : [each, each])), option.value, set, { id })
      : option.kind === "flag" ? make("input", { type: "checkbox", id, checked: Boolean(option.value), on: { change: (event) => set(event.target.checked) } })
      : make("input", { type: option.kind === "number" ? "number" : "text", step: "any", id, value: option.value ?? "", on: { input: (event) => set(event.target.value === "" ? null : option.kind === "number" ? Number(event.target.value) : event.target.value) } });
    return make("p.option", {}, make("label", { for: id }, option.title ?? option.name), " ", field, option.help ? make("span.note", {}, ` ${option.help}`) : null);
  }

  async begin() {
    if (this.run.disabled) return;
    this.run.disabled = true;
    try {
      const options = Object.fromEntries(Object.entries(this.values).filter(([, value]) => value !== null));
      const { job } = await change("POST", ofRun(this.of.run, "repair"), { step: this.step.step, options });
      alarm(null);
      remember({ [this.step.step]: String(job) });
      this.state = "running";
      this.follow(String(job));
    } catch (problem) {
      this.run.disabled = false;
      alarm(problem.message);
    }
  }

  /** Shows a job until it has ended. */
  async follow(job) {
    clearTimeout(this.timer);
    let told;
    try {
      told = await get(`api/jobs/${encodeURIComponent(job)}`);
    } catch (problem) {
      if (this.closed) return;
      this.run.disabled = this.ready === false;
      if (problem.status === 404) remember({ [this.step.step]: "" }); // of a server that was there before
      else fill(this.body, make("p.note", {}, problem.message));
      return;
    }
    if (this.closed) return;
    const running = told.state === "running";
    this.run.disabled = running || this.ready === false;
    this.paint(told);
    const ended = !running && this.state === "running";
    this.state = told.state;
    if (running) this.timer = setTimeout(() => this.follow(job), POLL_MS);
    else if (ended) {
      say(`${this.step.title}: ${told.state}`);
      this.done();
    }
  }

  paint(told) {
    const output = told.output ?? "";
    if (!this.body.firstChild) {
      this.parts = { state: make("p.state"), command: make("code.command"), output: make("pre.output", { tabindex: 0, role: "group", "aria-label": `Output of ${this.step.title}` }), result: make("div.result") };
      this.details = make("details", { open: told.state !== "done" }, make("summary", {}, "Output"), this.parts.output);
      fill(this.body, this.parts.state, this.parts.command, this.parts.result, this.details);
    }
    fill(this.parts.state, make(`span.badge.${told.state}`, {}, { running: "running …", done: "done", failed: "failed" }[told.state] ?? told.state));
    fill(this.parts.command, told.command ?? "");
    const shown = output.length > LONGEST_OUTPUT ? `…\n${output.slice(-LONGEST_OUTPUT)}` : output;
    if (this.written !== shown) {
      const atEnd = this.parts.output.scrollTop + this.parts.output.clientHeight >= this.parts.output.scrollHeight - 8;
      fill(this.parts.output, shown);
      if (atEnd) this.parts.output.scrollTop = this.parts.output.scrollHeight;
      this.written = shown;
    }
    this.details.hidden = !shown;
    if (told.state === "done") {
      if (this.state === "running" && told.result) this.details.open = false;
      fill(this.parts.result, ...resultOf(told.result, this.of));
    } else fill(this.parts.result);
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
  }
}

/** Returns what came out of a job: old beside new where it has both, then whatever else it says. */
function resultOf(result, run) {
  if (result === null || result === undefined) return [];
  if (typeof result !== "object" || Array.isArray(result)) return [tableOf(result)];
  const parts = [];
  if (result.sentence) parts.push(make("p.sentence", {}, result.sentence));
  if (result.old && result.new) {
    const names = [...new Set([...Object.keys(result.old), ...Object.keys(result.new)])];
    parts.push(make("div.scroll", { tabindex: 0, role: "group", "aria-label": "Old beside new" }, make("table.beside-table", {}, make("thead", {}, make("tr", {}, make("td", {}), make("th.number", { scope: "col" }, "old"), make("th.number", { scope: "col" }, "new"))), make("tbody", {}, ...names.map((name) => make("tr", {}, make("th", { scope: "row" }, name.replaceAll("_", " ")), make("td.number", {}, anything(result.old[name])), make("td.number", {}, anything(result.new[name]))))))));
  }
  if (result.rows) parts.push(tableOf(result.rows));
  if (result.differently) parts.push(make("h3", {}, `Flagged differently: ${result.differently.length}`), make("ul.others", {}, ...result.differently.slice(0, 200).map((row) => make("li", {}, make("a", { href: address(run.run, "rollout", row.rollout) }, make("span", {}, `${flagOf(row.old)} → ${flagOf(row.new)}`), make("span.snippet", {}, oneLine(head(row.snippet ?? String(row.rollout), 160))))))));
  const rest = Object.entries(result).filter(([name]) => !APART.has(name) || (name === "old" && !result.new) || (name === "new" && !result.old));
  if (rest.length) parts.push(tableOf(Object.fromEntries(rest)));
  return parts;
}

const flagOf = (value) => (value === true ? "flagged" : value === false ? "not flagged" : anything(value));
