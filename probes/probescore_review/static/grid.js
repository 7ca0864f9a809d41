/** Shows a table of any number of rows: only those in the window are drawn, and asked from the server. */

import { fill, make } from "./dom.js";

const PAGE = 100;
const TALLEST = 12_000_000; // pixels: what every browser can scroll; more rows than fit are scrolled through proportionally
const KEPT_PAGES = 60;
const WAIT_MS = 40; // a page that the user only flies over is not asked for

/**
 * Makes a table.
 * @param {object} of
 * @param {string} of.label what the table shows
 * @param {function(number, number, AbortSignal): Promise<{total: number, rows: object[]}>} of.read reads rows from an offset on
 * @param {function(HTMLElement, object, number): void} of.paint draws a row into its element
 * @param {function(object, number, boolean): void} of.chosen is told of a row that is opened; true = in a new tab
 * @param {function(number, boolean): void} of.moved is told of the place of the row that is current; true = it is being left
 * @param {function(Error): void} of.failed is told of a page that could not be read
 */
export function grid({ label, read, paint, chosen, moved, failed }) {
  const headRow = make("div.grid-head", { role: "row", "aria-rowindex": 1 });
  const body = make("div.grid-body", { role: "rowgroup" });
  const element = make("div.grid", { role: "grid", tabindex: 0, "aria-label": label, "aria-busy": "true" }, make("div", { role: "rowgroup", class: "grid-top" }, headRow), body);
  const drawn = new Map(); // elements by the place of their row
  let pages = new Map(); // rows by page; a promise's place is held by null
  let total = 0;
  let current = 0;
  let height = 36;
  let generation = 0;
  let aborting = new AbortController();
  let timer = null;

  const full = () => total * height;
  const tall = () => Math.min(full(), TALLEST);
  const windowHeight = () => Math.max(height, element.clientHeight - headRow.offsetHeight);
  /** Returns how far into all rows the window has scrolled, in pixels. */
  const scrolled = () => (full() <= TALLEST ? element.scrollTop : (element.scrollTop / Math.max(1, tall() - windowHeight())) * (full() - windowHeight()));
  const rowAt = (index) => pages.get(Math.floor(index / PAGE))?.[index % PAGE] ?? null;

  function layout() {
    const top = scrolled(), offset = element.scrollTop - top;
    const first = Math.max(0, Math.floor(top / height) - 6), last = Math.min(total, Math.ceil((top + windowHeight()) / height) + 6);
    for (const [index, row] of drawn) if (index < first || index >= last) {
      row.remove();
      drawn.delete(index);
    }
    for (let index = first; index < last; index++) {
      let row = drawn.get(index);
      if (!row) {
        row = make("div.grid-row", { role: "row", id: `row-${index}`, "aria-rowindex": index + 2, data: { index } });
        drawn.set(index, row);
        body.append(row);
      }
      row.style.transform = `translateY(${index * height + offset}px)`;
      const data = rowAt(index);
      if (data && row.dataset.painted !== String(generation)) {
        paint(row, data, index);
        row.dataset.painted = generation;
        row.classList.remove("waiting");
      } else if (!data) {
        row.classList.add("waiting");
        if (!row.childElementCount) fill(row, make("span", { role: "gridcell" }, "…"));
      }
      row.setAttribute("aria-selected", String(index === current));
    }
    if (drawn.has(current)) element.setAttribute("aria-activedescendant", `row-${current}`);
    else element.removeAttribute("aria-activedescendant");
    clearTimeout(timer);
    const missing = [];
    for (let page = Math.floor(first / PAGE); page <= Math.floor(Math.max(first, last - 1) / PAGE); page++) if (total && !pages.has(page)) missing.push(page);
    if (missing.length) timer = setTimeout(() => missing.forEach(load), WAIT_MS);
  }

  async function load(page) {
    if (pages.has(page)) return;
    const mine = generation;
    pages.set(page, null);
    try {
      const told = await read(page * PAGE, PAGE, aborting.signal);
      if (mine !== generation) return;
      pages.set(page, told.rows);
      for (const old of [...pages.keys()].slice(0, Math.max(0, pages.size - KEPT_PAGES))) if (old !== page) pages.delete(old);
      count(told.total);
    } catch (problem) {
      if (mine !== generation || problem.name === "AbortError") return;
      pages.delete(page);
      failed(problem);
    }
  }

  function count(wanted) {
    if (wanted !== total) {
      total = wanted;
      element.setAttribute("aria-rowcount", total + 1);
      body.style.height = `${tall()}px`;
      current = Math.max(0, Math.min(current, total - 1));
    }
    layout();
  }

  /** Makes a row current, and brings it into the window. */
  function move(index) {
    if (!total) return;
    current = Math.max(0, Math.min(total - 1, index));
    const top = scrolled(), at = current * height;
    const wanted = at < top ? at : at + height > top + windowHeight() ? at + height - windowHeight() : top;
    if (wanted !== top) element.scrollTop = full() <= TALLEST ? wanted : (wanted / Math.max(1, full() - windowHeight())) * (tall() - windowHeight());
    layout();
    moved(current);
  }

  element.addEventListener("scroll", layout, { passive: true });
  body.addEventListener("click", (event) => {
    const row = event.target.closest(".grid-row");
    if (!row || getSelection().toString()) return;
    const index = Number(row.dataset.index), data = rowAt(index);
    if (!data) return;
    move(index);
    moved(index, true);
    if (event.target.closest("a")) return; // the link knows where to go
    chosen(data, index, event.ctrlKey || event.metaKey);
  });
  const resized = new ResizeObserver(layout);
  resized.observe(element);

  return {
    element,
    headRow,
    /** Reads everything anew, and makes the row at a place current. */
    async reset(at = 0, rowHeight = height) {
      aborting.abort();
      aborting = new AbortController();
      generation++;
      pages = new Map();
      height = rowHeight;
      element.style.setProperty("--row", `${height}px`);
      current = at;
      element.setAttribute("aria-busy", "true");
      const mine = generation;
      await load(Math.floor(at / PAGE));
      if (mine !== generation) return;
      if (!pages.has(Math.floor(at / PAGE))) count(0); // it could not be read
      body.style.height = `${tall()}px`;
      if (at) move(at);
      else element.scrollTop = 0;
      layout();
      element.removeAttribute("aria-busy");
    },
    /** Draws the rows that are there again. */
    repaint() {
      generation++;
      layout();
    },
    move,
    openCurrent: (elsewhere) => {
      if (!rowAt(current)) return;
      moved(current, true);
      chosen(rowAt(current), current, elsewhere);
    },
    page: () => Math.max(1, Math.floor(windowHeight() / height) - 1),
    get current() {
      return current;
    },
    get total() {
      return total;
    },
    close() {
      aborting.abort();
      clearTimeout(timer);
      resized.disconnect();
    },
  };
}
