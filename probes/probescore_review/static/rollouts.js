/** The table of all rollouts: filters, sorts and searches on the server, saved views, and exports of what is shown. */

import { change, get, ofRun, query } from "./api.js";
import { alarm, choice, fill, make, say } from "./dom.js";
import { grid } from "./grid.js";
import { anything, count, signed, written } from "./numbers.js";
import { keyOf, thresholdOf } from "./readings.js";
import { address, remember, rememberSoon } from "./route.js";
import { head, oneLine } from "./text.js";

const OPS = {
  number: [">=", ">", "=", "!=", "<", "<=", "is known", "is unknown"],
  text: ["contains", "=", "!=", "is known", "is unknown"],
  label: ["=", "!=", "is known", "is unknown"],
};
const ALONE = new Set(["present", "empty", "is known", "is unknown"]); // comparisons without a value
const opsOf = (column) => (column.name.startsWith("wrong:") ? ["="] : (OPS[column.kind] ?? OPS.text).filter((op) => !column.ops || column.ops.includes(op)));
const LABELS = ["yes", "no", "unsure"];
const WAIT_MS = 250;
const narrow = matchMedia("(max-width: 720px)");

/** Returns what the server is asked for by the settings of a view. */
export const asked = ({ q, where, sort, descending }) => ({ q, where: where && where !== "[]" ? where : null, sort, descending: descending === "1" ? "1" : null });

export const rollouts = {
  title: "Rollouts",
  async open(box, run, place) {
    const told = await get(ofRun(run.run, "columns"));
    const columns = new Map(told.columns.map((each) => [each.name, each]));
    let views = told.views ?? [];
    const state = { q: "", where: "[]", sort: "", descending: "", view: "", columns: "", ...place.settings };
    const filters = () => {
      try {
        const list = JSON.parse(state.where);
        return Array.isArray(list) ? list.filter((each) => Array.isArray(each) && each.length === 3) : [];
      } catch {
        return []; // not written by this page
      }
    };
    const viewOf = () => views.find((view) => view.id === state.view && JSON.stringify(view.where ?? []) === JSON.stringify(filters()) && (view.sort ?? "") === state.sort && Boolean(view.descending) === (state.descending === "1") && (view.q ?? "") === state.q);
    if (state.view && !place.settings.where && !place.settings.sort) adopt(views.find((view) => view.id === state.view));

    function adopt(view) {
      Object.assign(state, { view: view?.id ?? "", where: JSON.stringify(view?.where ?? []), sort: view?.sort ?? "", descending: view?.descending ? "1" : "", q: view?.q ?? "" });
    }

    /** Returns the columns that are shown: those chosen, or the most useful ones. */
    function shownColumns() {
      const chosen = state.columns ? state.columns.split("|").filter((name) => columns.has(name)) : [];
      if (chosen.length) return chosen;
      const of = (start, most) => [...columns.keys()].filter((name) => name.startsWith(start)).slice(0, most);
      const wanted = ["step", ...of("score:", 4), ...of("difference:", 2), "task_reward", "label"];
      if (state.sort) wanted.push(state.sort);
      return [...new Set(wanted)].filter((name) => columns.has(name) && name !== "snippet");
    }

    // ---- the controls
    const search = make("input", { type: "search", placeholder: "Search the texts", "aria-label": "Search the texts of prompts and completions", value: state.q, "aria-keyshortcuts": "/" });
    const total = make("output.total", {}, "…");
    const chips = make("ul.chips", { "aria-label": "Filters" });
    const viewBox = make("span"), columnBox = make("div.menu-body"), exportBox = make("div.menu-body"), saveBox = make("div.menu-body");
    const filterBox = make("form.filter", { hidden: true, "aria-label": "New filter" });
    const menus = [["Columns", columnBox], ["Save view", saveBox], ["Export", exportBox]].map(([title, body]) => menu(title, body));
    const filterButton = make("button", { type: "button", "aria-expanded": "false", on: { click: () => openFilter(filterBox.hidden) } }, "Filter");
    let every = run.rollouts, grownTo = every; // the run may go on
    const fresh = make("button", { type: "button", hidden: true, on: { click: () => showFresh() } });
    const empty = make("p.nothing", { hidden: true }, "No rollout matches.");

    const table = grid({
      label: `Rollouts of ${run.name}`,
      read: async (offset, limit, signal) => {
        const page = await get(ofRun(run.run, "rollouts") + query({ ...asked(state), offset: String(offset), limit: String(limit) }), signal);
        every = Math.max(every, page.total);
        total.textContent = `${count(page.total)}${page.total === every ? "" : ` of ${count(every)}`} rollouts`;
        empty.hidden = page.total > 0;
        alarm(null);
        return page;
      },
      paint: paintRow,
      chosen: (row, index, elsewhere) => {
        const where = placeOf(row, index);
        if (elsewhere) open(where, "_blank", "noopener");
        else location.hash = where;
      },
      moved: (at, leaving) => (leaving ? remember : rememberSoon)({ at: at ? String(at) : "" }),
      failed: (problem) => {
        total.textContent = "";
        alarm(problem.message);
      },
    });
    const placeOf = (row, index) => address(run.run, "rollout", row.rollout, { list: JSON.stringify(asked(state)), at: String(index) });

    function paintRow(element, row, index) {
      const small = narrow.matches;
      const names = small ? fewColumns(row) : shownColumns();
      const cells = names.map((name) => {
        const cell = make("span.cell", { role: "gridcell" }, small && name !== "label" && make("small", {}, titleOf(name)));
        const kind = columns.get(name)?.kind;
        if (kind === "number") cell.classList.add("number");
        if (flagged(name, row[name])) cell.classList.add("flagged");
        cell.append(kind === "label" ? badge(row[name]) : make("span.value", {}, shortened(name, row[name], kind)));
        if (!small && kind === "text") cell.title = oneLine(head(String(row[name] ?? ""), 300));
        return cell;
      });
      const snippet = make("span.cell.snippet", { role: "gridcell" }, make("a", { href: placeOf(row, index), tabindex: -1 }, oneLine(head(row.snippet ?? String(row.rollout), 240))));
      fill(element, ...cells, snippet);
    }

    const fewColumns = (row) => {
      const main = state.sort && state.sort !== "step" ? state.sort : [...columns.keys()].find((name) => name.startsWith("score:"));
      return [...new Set(["step", main, "task_reward", ...(row.label ? ["label"] : [])])].filter((name) => columns.has(name));
    };
    const titleOf = (name) => columns.get(name)?.title ?? name;
    const thresholds = new Map(run.probes.flatMap((probe) => probe.readings.filter((reading) => thresholdOf(probe, reading)).map((reading) => [`score:${keyOf(probe.key, reading)}`, thresholdOf(probe, reading).value])));
    const flagged = (name, value) => typeof value === "number" && thresholds.has(name) && value >= thresholds.get(name);
    const shortened = (name, value, kind) => (kind === "number" ? (name.startsWith("difference:") ? signed(value) : written(value)) : value === null || value === undefined ? "–" : oneLine(head(String(value), 80)));

    function paintHead() {
      const names = shownColumns();
      const template = [...names.map((name) => (columns.get(name)?.kind === "text" ? "minmax(90px, 150px)" : columns.get(name)?.kind === "label" ? "84px" : name === "step" ? "72px" : "minmax(88px, 118px)")), "minmax(240px, 1fr)"].join(" ");
      table.element.style.setProperty("--template", template);
      table.element.setAttribute("aria-colcount", names.length + 1);
      fill(table.headRow, ...names.map((name) => {
        const title = make("span", {}, titleOf(name));
        const sorted = state.sort === name ? (state.descending === "1" ? "descending" : "ascending") : "none";
        return make("span.cell", { role: "columnheader", "aria-sort": sorted, class: columns.get(name)?.kind === "number" ? "number" : "" },
          columns.get(name)?.sortable === false ? title : make("button", { type: "button", title: columns.get(name)?.help ?? titleOf(name), on: { click: () => sortBy(name) } }, title, sorted === "none" ? null : make("span", { "aria-hidden": "true" }, sorted === "descending" ? " ↓" : " ↑")));
      }), make("span.cell", { role: "columnheader" }, "text"));
      table.element.dataset.narrow = narrow.matches;
    }

    function paintControls() {
      const now = viewOf();
      fill(viewBox, make("label.field", {}, make("span.unseen", {}, "View"), choice([["", now || !custom() ? "all rollouts" : "a view of your own"], ...views.map((view) => [view.id, view.title])], now?.id ?? "", (id) => {
        adopt(views.find((view) => view.id === id));
        search.value = state.q;
        changed();
      })));
      fill(chips, ...filters().map(([name, op, value], index) => make("li", {}, make("span.foreign", {}, ALONE.has(op) ? `${titleOf(name)} ${op.startsWith("is ") ? op : `is ${op}`}` : `${titleOf(name)} ${op} ${anything(value)}`),
        make("button.plain", { type: "button", "aria-label": `Remove the filter ${titleOf(name)} ${op} ${anything(value ?? "")}`, on: { click: () => {
          state.where = JSON.stringify(filters().filter((_, at) => at !== index));
          changed();
        } } }, "×"))), narrow.matches || (state.sort && !shownColumns().includes(state.sort)) ? sortChip() : null);
      fill(columnBox, ...[...columns.values()].filter((each) => each.name !== "snippet" && !each.name.startsWith("wrong:")).map((each) => {
        const tick = make("input", { type: "checkbox", checked: shownColumns().includes(each.name) });
        tick.addEventListener("change", () => {
          const wanted = new Set(shownColumns());
          if (tick.checked) wanted.add(each.name);
          else wanted.delete(each.name);
          state.columns = [...columns.keys()].filter((name) => wanted.has(name)).join("|");
          remember(state);
          paintHead();
          table.repaint();
        });
        return make("label", { title: each.help ?? "" }, tick, " ", each.title ?? each.name);
      }));
      fill(exportBox, make("p.note", {}, "What this view shows, as"), ...[["jsonl", "JSONL"], ["parquet", "Parquet"], ["html", "one HTML file"]].map(([format, title]) =>
        make("a", { href: ofRun(run.run, "export") + query({ format, ...asked(state) }), download: true }, title)));
      const name = make("input", { type: "text", required: true, maxlength: 80, placeholder: "Name of the view", "aria-label": "Name of the view" });
      fill(saveBox, make("form", { on: { submit: (event) => {
        event.preventDefault();
        save(name.value.trim());
      } } }, name, make("button", { type: "submit" }, "Save")), now && !now.built_in ? make("button.plain", { type: "button", on: { click: () => forget(now) } }, `Delete “${now.title}”`) : null);
    }
    const custom = () => filters().length || state.sort || state.q;
    const sortChip = () => make("li", {}, make("label", {}, "sorted by ", choice([["", "step"], ...[...columns.values()].filter((each) => each.sortable !== false && !["snippet", "step"].includes(each.name)).map((each) => [each.name, each.title ?? each.name])], state.sort, (name) => {
      state.sort = name;
      changed();
    })), state.sort ? make("button.plain", { type: "button", "aria-label": "Turn the order round", on: { click: () => sortBy(state.sort) } }, state.descending === "1" ? "↓" : "↑") : null);

    async function save(title) {
      if (!title) return;
      const id = title.toLowerCase().normalize("NFKD").replace(/[^a-z0-9]+/g, "-").slice(0, 60).replace(/^-+|-+$/g, "") || `view-${Date.now()}`;
      try {
        const view = { id, title, where: filters(), sort: state.sort || null, descending: state.descending === "1", q: state.q };
        await change("PUT", ofRun(run.run, "views", id), view);
        views = (await get(ofRun(run.run, "columns"))).views ?? [];
        state.view = id;
        remember(state);
        paintControls();
        for (const each of menus) each.open = false;
        say(`Saved the view ${title}`);
      } catch (problem) {
        alarm(problem.message);
      }
    }
    async function forget(view) {
      try {
        await change("DELETE", ofRun(run.run, "views", view.id));
        views = views.filter((each) => each !== view);
        adopt(null);
        changed();
      } catch (problem) {
        alarm(problem.message);
      }
    }

    function openFilter(wanted) {
      filterBox.hidden = !wanted;
      filterButton.setAttribute("aria-expanded", String(wanted));
      if (!wanted) return;
      const draft = { name: state.sort || "task_reward", op: null, value: "" };
      if (!columns.has(draft.name)) draft.name = [...columns.keys()][0];
      const paint = () => {
        const column = columns.get(draft.name), ops = opsOf(column);
        draft.op = ops.includes(draft.op) ? draft.op : ops[0];
        if (draft.name.startsWith("wrong:")) draft.value = "1";
        const needs = !ALONE.has(draft.op);
        const value = column.kind === "label"
          ? choice(LABELS.map((each) => [each, each]), draft.value || LABELS[0], (each) => (draft.value = each), { "aria-label": "Value" })
          : make("input", { type: column.kind === "number" ? "number" : "text", step: "any", required: true, value: draft.value, "aria-label": "Value", on: { input: (event) => (draft.value = event.target.value) } });
        if (column.kind === "label" && !LABELS.includes(draft.value)) draft.value = LABELS[0];
        fill(filterBox,
          choice([...columns.values()].filter((each) => each.name !== "snippet").map((each) => [each.name, each.title ?? each.name]), draft.name, (name) => {
            draft.name = name;
            draft.value = "";
            paint();
          }, { "aria-label": "Column" }),
          choice(ops.map((op) => [op, op]), draft.op, (op) => {
            draft.op = op;
            paint();
          }, { "aria-label": "Comparison" }),
          needs ? value : null, make("button", { type: "submit" }, "Add"), make("button.plain", { type: "button", on: { click: () => openFilter(false) } }, "Cancel"));
      };
      paint();
      filterBox.onsubmit = (event) => {
        event.preventDefault();
        const needs = !ALONE.has(draft.op), number = columns.get(draft.name).kind === "number";
        state.where = JSON.stringify([...filters(), [draft.name, draft.op, needs ? (number ? Number(draft.value) : draft.value) : null]]);
        openFilter(false);
        changed();
        filterButton.focus();
      };
      filterBox.querySelector("select").focus();
    }

    function sortBy(name) {
      if (state.sort === name) state.descending = state.descending === "1" ? "" : "1";
      else [state.sort, state.descending] = [name, columns.get(name)?.kind === "number" ? "1" : ""];
      changed();
    }

    /** Shows what the state says now, from the first row on. */
    function changed(at = 0) {
      remember({ ...state, where: state.where === "[]" ? "" : state.where, at: at ? String(at) : "" });
      paintControls();
      paintHead();
      return table.reset(at, narrow.matches ? 56 : 34);
    }

    function showFresh() {
      fresh.hidden = true;
      every = grownTo;
      changed();
      table.element.focus({ preventScroll: true });
    }

    let timer = null;
    search.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => {
        state.q = search.value.trim();
        changed();
      }, WAIT_MS);
    });
    const resize = () => changed(table.current);
    narrow.addEventListener("change", resize);

    fill(box, make("div.controls", {}, viewBox, search, filterButton, ...menus, fresh, total), filterBox, chips, empty, table.element);
    fit();
    addEventListener("resize", fit);
    function fit() {
      table.element.style.setProperty("--top", `${Math.round(table.element.getBoundingClientRect().top + scrollY)}px`);
    }
    const fitting = new ResizeObserver(fit);
    fitting.observe(chips);
    fitting.observe(filterBox);
    fitting.observe(box.querySelector(".controls"));
    await changed(Math.max(0, Number.parseInt(place.settings.at ?? "0", 10) || 0));
    table.element.focus({ preventScroll: true });

    const nextView = (by) => {
      const ids = ["", ...views.map((view) => view.id)];
      const id = ids[(ids.indexOf(viewOf()?.id ?? "") + by + ids.length) % ids.length];
      adopt(views.find((view) => view.id === id));
      search.value = state.q;
      changed();
      say(views.find((view) => view.id === id)?.title ?? "all rollouts");
    };
    return {
      grown(now) {
        fresh.textContent = `Show ${count(now.rollouts - every)} new`;
        grownTo = now.rollouts;
        fresh.hidden = false;
      },
      close() {
        table.close();
        fitting.disconnect();
        clearTimeout(timer);
        narrow.removeEventListener("change", resize);
        removeEventListener("resize", fit);
      },
      keys: [
        { keys: ["j", "ArrowDown"], title: "Next row", repeats: true, run: () => table.move(table.current + 1) },
        { keys: ["k", "ArrowUp"], title: "Row before", repeats: true, run: () => table.move(table.current - 1) },
        { keys: ["PageDown"], title: "A page on", repeats: true, run: () => table.move(table.current + table.page()) },
        { keys: ["PageUp"], title: "A page back", repeats: true, run: () => table.move(table.current - table.page()) },
        { keys: ["Home"], title: "First row", run: () => table.move(0) },
        { keys: ["End"], title: "Last row", run: () => table.move(table.total - 1) },
        { keys: ["Enter", "o"], title: "Open the rollout", run: () => table.openCurrent(false) },
        { keys: ["/"], title: "Search the texts", run: () => search.focus() },
        { keys: ["f"], title: "Add a filter", run: () => openFilter(true) },
        { keys: ["v"], title: "Next view", run: () => nextView(1) },
        { keys: ["V"], title: "View before", run: () => nextView(-1) },
        { keys: ["g"], title: "Show the rollouts that came since", run: () => fresh.hidden || showFresh() },
        { keys: ["c"], title: "Choose the columns", run: () => toggle(menus[0]) },
        { keys: ["s"], title: "Save this view", run: () => toggle(menus[1]) },
        { keys: ["x"], title: "Export this view", run: () => toggle(menus[2]) },
      ],
    };
  },
};

function toggle(each) {
  each.open = !each.open;
  if (each.open) (each.querySelector("input, a") ?? each.querySelector("summary")).focus();
}

function menu(title, body) {
  const details = make("details.menu", {}, make("summary", {}, title), body);
  details.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !details.open) return;
    event.preventDefault();
    details.open = false;
    details.querySelector("summary").focus();
  });
  details.addEventListener("focusout", (event) => {
    if (event.relatedTarget && !details.contains(event.relatedTarget)) details.open = false;
  });
  return details;
}

/** Returns a label as a small badge. */
export function badge(label) {
  if (label === null || label === undefined || label === "") return make("span.note", {}, "–");
  return make(`span.badge${["yes", "no", "unsure"].includes(label) ? `.${label}` : ""}`, {}, oneLine(head(String(label), 40)));
}
