/** Labels: the plan's queue of rollouts, blind until the label is given, one after the other, by keys. */

import { change, get, ofRun, query } from "./api.js";
import { alarm, fill, make, say } from "./dom.js";
import { count } from "./numbers.js";
import { waysOf } from "./readings.js";
import { completionOf, partsOf, promptOf, scoresOf } from "./rollout.js";
import { badge } from "./rollouts.js";
import { address, go, remember, route } from "./route.js";
import { head, oneLine } from "./text.js";

const NAME = "probescore-review-labeller";
const SAID = { yes: "Yes", no: "No", unsure: "Unsure" };

/** What a browser keeps for this page; it may keep nothing. */
function kept(store, key, value) {
  try {
    if (value === undefined) return JSON.parse(store.getItem(key) ?? "null");
    if (value === null) store.removeItem(key);
    else store.setItem(key, JSON.stringify(value));
  } catch {
    // then a reload forgets a draft; a label that was given is on the disk of the server
  }
  return null;
}

export const label = {
  title: "Label",
  async open(box, run, place) {
    const labeller = place.settings.labeller ?? kept(localStorage, NAME);
    if (!labeller) {
      askName(box, run, place);
      return {};
    }
    kept(localStorage, NAME, labeller);
    return new Labelling(box, run, place, labeller).open();
  },
};

function askName(box, run, place) {
  const name = make("input", { type: "text", id: "labeller", required: true, maxlength: 60, autocomplete: "nickname" });
  fill(box, make("form.card.narrow", { on: { submit: (event) => {
    event.preventDefault();
    if (name.value.trim()) go(run.run, "label", place.item, { ...place.settings, labeller: name.value.trim() });
  } } }, make("h2", {}, "Who labels?"), make("p", {}, "Every label is kept with who gave it and when. Two people can label at once: each gets rollouts of their own."), make("label", { for: "labeller" }, "Your name"), make("p.actions", {}, name, make("button.primary", { type: "submit" }, "Begin"))));
  name.focus();
}

/** One person's labelling of a run. */
class Labelling {
  constructor(box, run, place, labeller) {
    Object.assign(this, { run, place, labeller, box, told: null, given: null, busy: false, closed: false });
    this.blind = place.settings.blind !== "0";
    this.onward = place.settings.onward === "1";
    this.parts = { top: make("div"), content: make("div"), bar: make("div.bar-below", { role: "toolbar", "aria-label": "Label" }) };
    this.note = make("textarea", { id: "note", rows: 2, maxlength: 4000, on: { input: () => this.keep() } });
  }

  get draftKey() {
    return `probescore-review-draft:${this.run.run}:${this.told.rollout}:${this.labeller}`;
  }

  async open() {
    fill(this.box, this.parts.top, this.parts.content, this.parts.bar);
    await this.again();
    const say3 = (each) => () => this.answer(each);
    return {
      close: () => {
        this.closed = true;
      },
      keys: [
        { keys: ["y"], title: "Yes", run: say3("yes") },
        { keys: ["n"], title: "No", run: say3("no") },
        { keys: ["u"], title: "Unsure", run: say3("unsure") },
        { keys: ["m"], title: "Write a note (Esc leaves it)", run: () => this.note.isConnected && this.note.focus() },
        { keys: ["t"], title: "Go to the tokens: ← → move, Shift draws a span, Enter marks it, Backspace takes it away", run: () => this.box.querySelector(".tokens")?.focus() },
        { keys: ["z"], title: "Undo the last label", run: () => this.undo() },
        { keys: ["Enter", "j", " "], title: "Next rollout, once the label is given", run: () => (this.given || this.passed) && this.next() },
        { keys: ["d"], title: "Take all spans of this rollout away", run: () => this.setSpans([]) },
      ],
    };
  }

  /** Shows the next rollout of the plan's queue. */
  async next() {
    if (this.busy) return;
    if (this.place.item) {
      go(this.run.run, "label", null, { labeller: this.labeller });
      return;
    }
    await this.during(async () => {
      const told = await get(ofRun(this.run.run, "queue") + query({ labeller: this.labeller, blind: this.blind ? "1" : "0" }));
      this.start(told.rollout, told);
    });
  }

  /** Shows the same rollout again, blind or not. */
  again() {
    return this.place.item ? this.single(this.place.item) : this.next();
  }

  /** Shows one rollout that was asked for by name. */
  async single(name) {
    await this.during(async () => {
      const all = await get(ofRun(this.run.run, "rollouts", name));
      const told = this.blind ? await get(ofRun(this.run.run, "rollouts", name) + query({ blind: "1" })) : all;
      this.start(told, { second: Boolean(all.labels?.length) });
    });
  }

  start(told, queue) {
    if (this.closed) return;
    this.told = told;
    this.queue = queue;
    this.given = null;
    this.passed = false; // whether somebody else has labelled it meanwhile
    const draft = told ? kept(sessionStorage, this.draftKey) : null;
    this.spans = draft?.spans ?? [];
    this.pending = draft?.pending ?? null;
    this.note.value = draft?.note ?? "";
    this.paint();
    scrollTo(0, 0);
    if (told) say(`Rollout of step ${told.step}${queue.of ? `, ${queue.done} of ${queue.of} labelled` : ""}`);
    if (this.pending) alarm(`Your label “${this.pending}” is not saved yet: press its key again.`);
  }

  paint() {
    const { told, queue, given } = this;
    const blind = make("input", { type: "checkbox", checked: this.blind });
    blind.addEventListener("change", () => {
      this.blind = blind.checked;
      remember({ blind: this.blind ? "" : "0" });
      this.again();
    });
    const onward = make("input", { type: "checkbox", checked: this.onward });
    onward.addEventListener("change", () => {
      this.onward = onward.checked;
      remember({ onward: this.onward ? "1" : "" });
    });
    fill(this.parts.top,
      make("div.controls", {},
        make("span", {}, "Labelling as ", make("b.foreign", {}, oneLine(head(this.labeller, 60))), " ", make("button.plain", { type: "button", on: { click: () => this.rename() } }, "change")),
        make("label", {}, blind, " blind"),
        this.place.item ? null : make("label", {}, onward, " go on at once"),
        make("span.spacer"), queue.of ? make("label.progress", {}, make("span", {}, `${count(queue.done)} of ${count(queue.of)}`), make("progress", { max: queue.of, value: queue.done })) : null,
        told && !this.place.item ? make("details.menu", {}, make("summary", {}, "Plan"), make("div.menu-body", {}, this.planForms())) : null));
    if (!told) {
      fill(this.parts.content, this.finished());
      fill(this.parts.bar, kept(sessionStorage, this.lastKey) ? this.undoButton() : null);
      return;
    }
    const shown = given ? given.told : told;
    const open = given || !this.blind;
    const probe = open ? this.run.probes[0] ?? null : null;
    const marking = given ? null : { spans: this.spans, changed: (spans) => {
      this.spans = spans;
      this.keep();
      this.paintSpans();
    } };
    this.spanList = make("div");
    const view = shown.tokens?.length ? completionOf(shown, probe, probe ? waysOf(probe)[0] : "", marking) : completionOf(shown, probe, "");
    fill(this.parts.content,
      make("section.card", {}, make("h2.title", {}, "Prompt", make("span.note", {}, ` step ${told.step}`)), promptOf(shown.prompt)),
      make("section.card", {}, make("h2.title", {}, "Completion"), partsOf(shown, (part) => this.turn(part)), view, this.spanList),
      given
        ? make("section.card", {}, make("h2.title", {}, "What the probes say"), scoresOf(shown.scores, shown.thresholds), queue.second ? make("p.note", {}, "This was a second judgement: somebody else has labelled it before, and no probe flags it.") : null, make("p", {}, make("a", { href: address(this.run.run, "rollout", told.rollout) }, "All of this rollout")))
        : make("section.card", {}, make("label", { for: "note" }, "Note"), this.note));
    this.paintSpans();
    fill(this.parts.bar, given
      ? make("span.given", {}, "Saved: ", badge(given.label))
      : make("span.question", {}, told.question ?? queue.question ?? "Does this completion show the behaviour?"),
    ...(given
      ? [make("button.primary", { type: "button", on: { click: () => this.next() } }, "Next ", make("kbd", {}, "Enter"))]
      : Object.entries(SAID).map(([each, title]) => make(`button.answer.${each}`, { type: "button", "aria-keyshortcuts": each[0], on: { click: () => this.answer(each) } }, `${title} `, make("kbd", {}, each[0])))),
    this.passed ? make("button", { type: "button", on: { click: () => this.next() } }, "Next ", make("kbd", {}, "Enter")) : null,
    given || kept(sessionStorage, this.lastKey) ? this.undoButton() : null);
  }

  get lastKey() {
    return `probescore-review-last:${this.run.run}:${this.labeller}`;
  }

  undoButton() {
    return make("button.plain", { type: "button", on: { click: () => this.undo() } }, "Undo ", make("kbd", {}, "z"));
  }

  finished() {
    const { queue } = this;
    return make("section.card.narrow", {},
      make("h2", {}, queue.of ? "All that the plan asks for is labelled" : "There is no plan yet"),
      make("p", {}, queue.of ? `${count(queue.done)} of ${count(queue.of)} labels are given. Audit again to see what they say, or plan more.` : "A plan draws at random the rollouts whose labels tell most about the run, and keeps with which probability each was drawn."),
      this.planForms(), queue.of ? make("p", {}, make("a", { href: address(this.run.run, "repair") }, "Audit again")) : null);
  }

  /** Returns the ways to have more rollouts planned: for steps that have no plan, or further ones of the last steps. */
  planForms() {
    const [first, last] = this.run.steps ?? [0, 0];
    const number = (name, value, min) => make("input", { type: "number", name, id: `plan-${name}`, required: true, min, max: 100000, value });
    const field = (title, input) => make("p.option", {}, make("label", { for: input.id }, title), " ", input);
    const form = (button, fields, body) => make("form.plan", { on: { submit: (event) => {
      event.preventDefault();
      this.plan(body(Object.fromEntries([...new FormData(event.target)].map(([name, value]) => [name, Number(value)]))), event.target);
    } } }, ...fields, make("p.actions", {}, make("button.primary", { type: "submit" }, button)));
    return make("div.plans", {},
      form("Plan these steps", [field("Labels of each step", number("per_step", 32, 4)), field("From step", number("first_step", Math.max(first, last - 9), 0)), field("to step", number("last_step", last, 0))], (values) => values),
      this.queue.of && this.queue.done >= this.queue.of ? form("Plan further labels", [field("Further labels of the last steps", number("more", 50, 1))], (values) => values) : null);
  }

  async plan(asked, form) {
    const button = form.querySelector("button");
    button.disabled = true;
    try {
      const { added } = await change("POST", ofRun(this.run.run, "plan"), asked);
      say(`${count(added)} rollouts planned`);
      if (!added) alarm("The plan has these steps already: no rollout was added.");
      else if (!this.told || this.given) await this.next();
      else {
        this.queue = { ...this.queue, of: this.queue.of + added };
        this.keep();
        this.paint();
      }
    } catch (problem) {
      alarm(problem.message);
    }
    button.disabled = false;
  }

  /** Shows another part of a completion that is too long to be shown at once. */
  async turn(part) {
    await this.during(async () => {
      const told = await get(ofRun(this.run.run, "rollouts", this.told.rollout) + query({ blind: this.given || !this.blind ? null : "1", part: String(part) }));
      if (this.given) this.given.told = told;
      else this.told = told;
      this.paint();
    });
  }

  paintSpans() {
    if (!this.told?.tokens?.length || this.given) return;
    const from = this.told.tokens_from ?? 0, textOf = (start, end) => this.told.tokens.slice(Math.max(0, start - from), Math.max(0, end - from)).map((token) => head(token.text, 40)).join("");
    fill(this.spanList, this.spans.length
      ? make("ul.chips", { "aria-label": "Spans" }, ...this.spans.map(([start, end], index) => make("li", {}, make("span.foreign", {}, `tokens ${start + 1} to ${end}: “${oneLine(head(textOf(start, end), 60))}”`), make("button.plain", { type: "button", "aria-label": `Take the span of tokens ${start + 1} to ${end} away`, on: { click: () => this.setSpans(this.spans.filter((_, at) => at !== index)) } }, "×"))))
      : make("p.note", {}, "Drag over tokens to mark the part that shows it."));
  }

  setSpans(spans) {
    if (!this.told || this.given) return;
    this.spans = spans;
    this.keep();
    this.paint();
  }

  keep() {
    if (!this.told || this.given) return;
    const draft = { note: this.note.value, spans: this.spans, pending: this.pending };
    kept(sessionStorage, this.draftKey, draft.note || draft.spans.length || draft.pending ? draft : null);
  }

  async answer(each) {
    if (!this.told || this.busy) return;
    if (this.given) {
      say("It has your label already. Press z to undo it first.");
      return;
    }
    const key = this.draftKey;
    this.pending = each;
    this.keep(); // what is not saved yet survives a reload
    await this.during(async () => {
      const body = { rollout: this.told.rollout, label: each, labeller: this.labeller, note: this.note.value.trim(), spans: this.spans, second: Boolean(this.queue.second) };
      const saved = await change("POST", ofRun(this.run.run, "labels"), body);
      this.pending = null;
      kept(sessionStorage, key, null);
      kept(sessionStorage, this.lastKey, { id: saved.label_id, rollout: this.told.rollout, second: Boolean(this.queue.second), note: body.note, spans: body.spans });
      say(`Saved: ${each}`);
      if (this.queue.of && !this.place.item && !this.queue.second) this.queue = { ...this.queue, done: Math.min(this.queue.of, this.queue.done + 1) };
      this.given = { label: each, told: saved.rollout ?? this.told, note: this.note.value, spans: this.spans };
    });
    if (this.given && this.onward && !this.place.item) await this.next();
    else if (this.given) {
      this.paint();
      this.parts.bar.querySelector("button")?.focus({ preventScroll: true });
    }
  }

  /** Takes the last label back; what was written with it is there again. */
  async undo() {
    const last = kept(sessionStorage, this.lastKey);
    if (!last || this.busy) {
      say("There is nothing to undo");
      return;
    }
    await this.during(async () => {
      await change("POST", ofRun(this.run.run, "labels", last.id, "undo"), { labeller: this.labeller });
      kept(sessionStorage, this.lastKey, null);
      say("The label is taken back");
      const { given, told, queue } = this;
      if (given && told.rollout === last.rollout) {
        if (queue.of && !queue.second) this.queue = { ...queue, done: Math.max(0, queue.done - 1) };
        this.given = null;
        this.spans = given.spans;
        this.note.value = given.note;
        this.keep();
        this.paint();
      } else if (!this.place.item) {
        const undone = await get(ofRun(this.run.run, "rollouts", last.rollout) + query({ blind: this.blind ? "1" : null }));
        this.start(undone, { ...queue, done: Math.max(0, queue.done - (last.second ? 0 : 1)), second: last.second });
        this.note.value = last.note;
        this.setSpans(last.spans);
      } else this.paint();
    });
  }

  /** Does something with the server, one thing at a time. */
  async during(work) {
    this.busy = true;
    try {
      await work();
      if (!this.pending) alarm(null);
    } catch (problem) {
      if (this.closed) return;
      if (!this.queue) throw problem;
      if (problem.status === 409 && this.pending) { // somebody else was first: this label is not wanted any more
        this.pending = null;
        this.keep();
        alarm(problem.message);
        this.passed = true;
        this.paint();
        return;
      }
      alarm(this.pending ? `Not saved: ${problem.message} Press the key again.` : problem.message);
    } finally {
      this.busy = false;
    }
  }

  rename() {
    kept(localStorage, NAME, null);
    const { settings } = route();
    delete settings.labeller;
    go(this.run.run, "label", this.place.item, settings);
    askName(this.box, this.run, { ...this.place, settings });
  }
}
