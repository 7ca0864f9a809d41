/** Starts the page: reads the runs, and shows the view that the address names. */

import { get } from "./api.js";
import { alarm, byId, fill, make, say } from "./dom.js";
import { bind, bindEverywhere, help } from "./keys.js";
import { label } from "./label.js";
import { count } from "./numbers.js";
import { overview } from "./overview.js";
import { repair } from "./repair.js";
import { rollout } from "./rollout.js";
import { rollouts } from "./rollouts.js";
import { address, go, route } from "./route.js";
import { suspicious } from "./suspicious.js";

const VIEWS = { overview, rollouts, suspicious, label, repair };
const HIDDEN = { rollout }; // reached from the others
const LIVE_MS = 20_000;
const SLOW_MS = 400;
let runs = [];
let open = null; // what is shown: {close?, keys?}
let opening = 0;

/** Shows the view that the address names. */
async function show() {
  const place = route();
  const run = runs.find((each) => each.run === place.run);
  const view = VIEWS[place.view] ?? HIDDEN[place.view];
  if (!run || !view) {
    location.replace(address((run ?? runs[0]).run, "overview"));
    return;
  }
  const turn = ++opening;
  open?.close?.();
  open = null;
  byId("tip").hidden = true;
  alarm(null);
  paintTop(place, run);
  document.title = `${view.title} · ${run.name} · probescore review`;
  const heading = make("h1.unseen", { tabindex: -1 }, `${view.title}: ${run.name}`);
  const box = make("div.view", { data: { view: place.view } });
  fill(byId("content"), heading, box);
  bind(view.title, []);
  scrollTo(0, 0);
  heading.focus({ preventScroll: true });
  box.setAttribute("aria-busy", "true");
  const slow = setTimeout(() => turn === opening && !box.firstChild && fill(box, make("p.nothing", { role: "status" }, view.slow ?? "Reading …")), SLOW_MS);
  try {
    const made = await view.open(box, run, place, runs);
    if (turn !== opening) {
      made?.close?.(); // another view was asked for meanwhile
      return;
    }
    open = made;
    bind(view.title, made?.keys ?? []);
  } catch (problem) {
    if (turn === opening) fill(box, make("section.card", {}, make("h2", {}, "This view cannot be shown"), make("p", {}, problem.message), make("button", { type: "button", on: { click: show } }, "Try again")));
    if (!problem.status && problem.name !== "Refusal") console.error(problem);
  }
  clearTimeout(slow);
  box.removeAttribute("aria-busy");
}

function paintTop(place, run) {
  const select = byId("run");
  fill(select, ...runs.map((each) => make("option", { value: each.run, selected: each === run }, `${each.name} · ${count(each.rollouts)} rollouts${each.live ? " · live" : ""}`)));
  select.title = run.folder_name ?? run.name;
  fill(byId("views"), ...Object.entries(VIEWS).map(([name, view], index) =>
    make("li", {}, make("a", { href: address(run.run, name), "aria-current": name === place.view ? "page" : null, title: `Key ${index + 1}` }, view.title))));
}

/** Reads the runs again, so that a run that goes on shows how far it is. */
async function refresh() {
  if (document.hidden || !runs.some((run) => run.live)) return;
  try {
    const now = (await get("api/runs")).runs;
    if (!now.length) return;
    const grown = now.some((run) => run.rollouts !== runs.find((each) => each.run === run.run)?.rollouts);
    runs.splice(0, runs.length, ...now);
    const place = route(), run = runs.find((each) => each.run === place.run);
    if (grown && run && document.activeElement !== byId("run")) paintTop(place, run);
    if (grown && run) open?.grown?.(run); // the view was opened with the run as it was
  } catch {
    // the next view that is asked for says that the server is gone
  }
}

bindEverywhere([
  ...Object.entries(VIEWS).map(([name, view], index) => ({ keys: [String(index + 1)], title: view.title, run: () => go(route().run, name) })),
  { keys: ["?"], title: "Show these keys", run: help },
  { keys: ["Escape"], title: "Leave a field; close what is open", run: () => byId("main").focus({ preventScroll: true }) },
]);
byId("help-button").addEventListener("click", help);
byId("run").addEventListener("change", () => {
  const { view } = route();
  go(byId("run").value, HIDDEN[view] ? "rollouts" : view);
});
byId("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the view
  byId("main").focus();
});

try {
  runs = (await get("api/runs")).runs;
  if (runs.length) {
    addEventListener("hashchange", show);
    await show();
    setInterval(refresh, LIVE_MS);
    addEventListener("focus", refresh);
  } else fill(byId("content"), make("p.nothing", {}, "There are no rollouts to review."));
} catch (problem) {
  fill(byId("content"), make("p.nothing", {}, problem.message));
  say(problem.message);
}
