/** Lists of rollouts that behaviour alone would pass, each with why it is here. */

import { get, ofRun } from "./api.js";
import { download, fill, make, say } from "./dom.js";
import { anything, written } from "./numbers.js";
import { badge } from "./rollouts.js";
import { address, remember, rememberSoon } from "./route.js";
import { head, oneLine } from "./text.js";

const MOST_FACTS = 9;

export const suspicious = {
  title: "Suspicious",
  async open(box, run, place) {
    const lists = (await get(ofRun(run.run, "suspicious"))).lists ?? [];
    if (!lists.length) {
      fill(box, make("p.nothing", {}, "There are no scores to look for suspicious rollouts by."));
      return {};
    }
    let which = Math.max(0, lists.findIndex((list) => list.id === place.settings.list));
    let at = Math.max(0, Number.parseInt(place.settings.at ?? "0", 10) || 0);
    const tabs = make("div.tabs", { role: "tablist", "aria-label": "Lists" });
    const panel = make("section.card", { role: "tabpanel", id: "list", tabindex: -1 });

    function paint() {
      const list = lists[which];
      at = Math.max(0, Math.min(at, (list.rows?.length ?? 1) - 1));
      fill(tabs, ...lists.map((each, index) => make("button", { type: "button", role: "tab", id: `tab-${index}`, "aria-controls": "list", "aria-selected": String(index === which), tabindex: index === which ? 0 : -1, on: { click: () => choose(index) } },
        each.title, make("span.note", {}, ` ${each.rows?.length ?? 0}`))));
      panel.setAttribute("aria-labelledby", `tab-${which}`);
      const items = (list.rows ?? []).map((row, index) => itemOf(run, list, row, index));
      fill(panel, make("div.head", {}, make("h2", {}, list.title), make("span.spacer"), items.length ? make("button", { type: "button", on: { click: save } }, "Export as JSONL") : null), make("p.why", {}, list.why), items.length ? make("ol.findings", {}, ...items) : make("p.nothing", {}, list.said ?? "Nothing here."));
    }
    const save = () => download(`${run.name}-${lists[which].id}`, lists[which].rows ?? []);
    function choose(index) {
      which = (index + lists.length) % lists.length;
      at = 0;
      remember({ list: lists[which].id, at: "" });
      paint();
      say(lists[which].title);
    }
    function move(index) {
      const links = [...panel.querySelectorAll(".finding > a")];
      if (!links.length) return;
      at = Math.max(0, Math.min(links.length - 1, index));
      links[at].focus();
      links[at].scrollIntoView({ block: "nearest" });
      rememberSoon({ list: lists[which].id, at: String(at) });
    }
    panel.addEventListener("click", (event) => {
      const chosen = [...panel.querySelectorAll(".finding > a")].indexOf(event.target.closest("a"));
      if (chosen >= 0) remember({ list: lists[which].id, at: String(chosen) }); // where back leads to
    });
    tabs.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      choose(which + by);
      tabs.children[which].focus();
    });
    paint();
    fill(box, tabs, panel);
    if (place.settings.at) queueMicrotask(() => move(at));
    const started = () => panel.contains(document.activeElement) && document.activeElement !== panel;
    return { keys: [
      { keys: ["j", "ArrowDown"], title: "Next rollout", repeats: true, run: () => move(started() ? at + 1 : at) },
      { keys: ["k", "ArrowUp"], title: "Rollout before", repeats: true, run: () => move(started() ? at - 1 : at) },
      { keys: ["Enter", "o"], title: "Open the rollout", run: () => panel.querySelectorAll(".finding > a")[at]?.click() },
      { keys: ["]", "v"], title: "Next list", run: () => choose(which + 1) },
      { keys: ["x"], title: "Export this list", run: save },
      { keys: ["[", "V"], title: "List before", run: () => choose(which - 1) },
    ] };
  },
};

function itemOf(run, list, row, index) {
  const facts = Object.entries({ ...row, ...row.scores }).filter(([name, value]) => typeof value === "number" && (name === "task_reward" || name === "similarity" || name.includes(":")));
  return make("li.finding", {},
    make("a", { href: address(run.run, "rollout", row.rollout, { suspicious: list.id, at: String(index) }) },
      make("span.place", {}, `step ${anything(row.step)}`), row.label ? badge(row.label) : null, make("span.why", {}, row.why ?? "")),
    make("p.snippet", {}, oneLine(head(row.snippet ?? String(row.rollout), 400))),
    facts.length ? make("p.facts", {}, ...facts.slice(0, MOST_FACTS).map(([name, value]) => make("span.foreign", {}, `${titleOf(name)} `, make("b.number", {}, written(value))))) : null);
}

/** Returns the title of a column of the table of rollouts. */
function titleOf(name) {
  const [kind, ...rest] = name.split(":");
  return kind === "score" ? rest.join(" ") : kind === "difference" ? `${rest.join(" ")} difference` : name.replaceAll("_", " ");
}
