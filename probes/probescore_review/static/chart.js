/** Draws numbers by training step as SVG, each with its band, and lets a point be chosen with the pointer or with keys. */

import { draw, fill, make } from "./dom.js";

const WIDTH = 440, HEIGHT = 210, LEFT = 48, RIGHT = 432, TOP = 10, BOTTOM = 180;
const MOST_DOTS = 60;
const COLOURS = ["first", "second", "third", "fourth"];

/** Returns the class of the colour of the n-th curve. */
export const colourOf = (index) => COLOURS[index % COLOURS.length];

const known = (value) => typeof value === "number" && Number.isFinite(value);

/** Returns round values that divide a range into about `wanted` parts. */
export function ticks(low, high, wanted) {
  const raw = (high - low) / wanted, size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((each) => each * size).find((each) => each >= raw);
  const made = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) made.push(Number(value.toPrecision(12)));
  return made;
}

/** Returns the range of the vertical axis that shows all of some curves and levels. */
export function rangeOf(curves, levels = []) {
  const every = [...levels, ...curves.flatMap((curve) => [...curve.value, ...(curve.low ?? []), ...(curve.high ?? [])])].filter(known);
  if (!every.length) return [0, 1];
  const low = Math.min(0, ...every), high = Math.max(...every, low + 1e-3);
  return [low < 0 ? low - 0.06 * (high - low) : 0, high + 0.06 * (high - low)];
}

/**
 * Returns a chart.
 * @param {object} of
 * @param {string} of.title what the chart shows
 * @param {{title: string, colour: string, steps: number[], value: (number|null)[], low?: (number|null)[], high?: (number|null)[]}[]} of.curves
 * @param {number[]} of.xRange first and last step
 * @param {number[]} of.yRange ends of the vertical axis
 * @param {number[]} [of.levels] heights of dashed lines
 * @param {number[]} [of.marks] steps of vertical lines
 * @param {function(number): string} of.text writes a number of the vertical axis
 * @param {function(object, number): void} of.pick is told of a curve and a step that were chosen
 */
export function chart({ title, curves, xRange, yRange, levels = [], marks = [], text, pick }) {
  const [first, last] = [xRange[0], Math.max(xRange[1], xRange[0] + 1)];
  const x = (step) => LEFT + ((RIGHT - LEFT) * (step - first)) / (last - first);
  const y = (value) => BOTTOM - ((BOTTOM - TOP) * (Math.min(Math.max(value, yRange[0]), yRange[1]) - yRange[0])) / (yRange[1] - yRange[0]);
  const at = (step, value) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`;
  const svg = draw("svg.chart", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true" });
  for (const value of ticks(...yRange, 4)) {
    svg.append(draw("line.grid", { x1: LEFT, x2: RIGHT, y1: y(value), y2: y(value) }), draw("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, text(value).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "")));
  }
  for (const step of ticks(first, last, 6).filter(Number.isInteger)) svg.append(draw("text", { x: x(step), y: BOTTOM + 16, "text-anchor": "middle" }, String(step)));
  svg.append(draw("text", { x: RIGHT, y: HEIGHT - 1, "text-anchor": "end" }, "step"));
  for (const level of levels) svg.append(draw("line.dashed.soft", { x1: LEFT, x2: RIGHT, y1: y(level), y2: y(level) }));
  for (const step of marks) svg.append(draw("line.mark", { x1: x(step), x2: x(step), y1: TOP, y2: BOTTOM }));
  for (const curve of curves) {
    for (const stretch of stretches(curve)) {
      if (curve.low && curve.high) {
        const banded = stretch.filter((index) => known(curve.low[index]) && known(curve.high[index]));
        const upper = banded.map((index) => at(curve.steps[index], curve.high[index])), lower = banded.map((index) => at(curve.steps[index], curve.low[index]));
        if (banded.length) svg.append(draw(`path.band.${curve.colour}`, { d: `M${[...upper, ...lower.reverse()].join("L")}Z` }));
      }
      svg.append(draw(`path.curve.${curve.colour}`, { d: `M${stretch.map((index) => at(curve.steps[index], curve.value[index])).join("L")}` }));
      if (curve.steps.length > MOST_DOTS && stretch.length > 1) continue;
      for (const index of stretch) {
        const [low, high] = [curve.low?.[index], curve.high?.[index]];
        if (known(low) && known(high)) svg.append(draw(`line.curve.thin.${curve.colour}`, { x1: x(curve.steps[index]), x2: x(curve.steps[index]), y1: y(low), y2: y(high) }));
        svg.append(draw(`circle.fill.${curve.colour}`, { cx: x(curve.steps[index]), cy: y(curve.value[index]), r: 2.6 }));
      }
    }
  }
  const guide = draw("line.guide", { y1: TOP, y2: BOTTOM, visibility: "hidden" }), dot = draw("circle.dot", { r: 5, visibility: "hidden" });
  svg.append(guide, dot);

  const points = curves.flatMap((curve, which) => curve.steps.flatMap((step, index) => (known(curve.value[index]) ? [{ curve, which, step, index }] : [])));
  const bySteps = [...points].sort((a, b) => a.step - b.step || a.which - b.which);
  let held = null;
  const readout = make("p.readout", {}, points.length ? "\u00a0" : "No numbers here.");
  const sentence = ({ curve, step, index }) => {
    const band = known(curve.low?.[index]) && known(curve.high?.[index]) ? ` (${text(curve.low[index])} to ${text(curve.high[index])})` : "";
    return `step ${step} · ${curve.title} ${text(curve.value[index])}${band}`;
  };
  const box = make("div.plot", points.length ? { tabindex: 0, role: "slider", "aria-label": title, "aria-valuemin": first, "aria-valuemax": last, "aria-valuenow": first, "aria-valuetext": "Arrow keys move from point to point, Enter shows the rollouts of a point" } : {}, svg);

  function hold(point) {
    held = point;
    for (const each of [guide, dot]) each.setAttribute("visibility", point ? "visible" : "hidden");
    if (!point) {
      fill(readout, "\u00a0");
      return;
    }
    guide.setAttribute("x1", x(point.step));
    guide.setAttribute("x2", x(point.step));
    dot.setAttribute("cx", x(point.step));
    dot.setAttribute("cy", y(point.curve.value[point.index]));
    dot.setAttribute("class", `dot ${point.curve.colour}`);
    fill(readout, sentence(point));
    box.setAttribute("aria-valuenow", point.step);
    box.setAttribute("aria-valuetext", readout.textContent);
  }
  function nearest(event) {
    const size = svg.getBoundingClientRect(), scale = WIDTH / size.width;
    const [px, py] = [(event.clientX - size.left) * scale, (event.clientY - size.top) * scale];
    let best = null, least = Infinity;
    for (const point of points) {
      const away = 4 * Math.abs(x(point.step) - px) + Math.abs(y(point.curve.value[point.index]) - py); // the step before the curve
      if (away < least) [best, least] = [point, away];
    }
    return best;
  }
  if (points.length) {
    box.addEventListener("pointermove", (event) => hold(nearest(event)));
    box.addEventListener("pointerleave", () => document.activeElement !== box && hold(null));
    box.addEventListener("click", (event) => {
      hold(nearest(event));
      pick(held.curve, held.step);
    });
    box.addEventListener("focus", () => held ?? hold(bySteps[0]));
    box.addEventListener("blur", () => hold(null));
    box.addEventListener("keydown", (event) => {
      const now = bySteps.indexOf(held ?? bySteps[0]);
      if (event.key === "Enter" || event.key === " ") pick(bySteps[now].curve, bySteps[now].step);
      else if (event.key === "Home") hold(bySteps[0]);
      else if (event.key === "End") hold(bySteps.at(-1));
      else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
        const same = bySteps.filter((each) => each.which === bySteps[now].which);
        hold(same[Math.max(0, Math.min(same.length - 1, same.indexOf(bySteps[now]) + (event.key === "ArrowRight" ? 1 : -1)))]);
      } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
        const there = bySteps.filter((each) => each.step === bySteps[now].step).sort((a, b) => a.curve.value[a.index] - b.curve.value[b.index]);
        hold(there[Math.max(0, Math.min(there.length - 1, there.indexOf(bySteps[now]) + (event.key === "ArrowUp" ? 1 : -1)))]);
      } else return;
      event.preventDefault();
    });
  }
  return make("div", {}, box, readout);
}

/** Returns the places of a curve's numbers, in stretches without a gap. */
function stretches(curve) {
  const made = [];
  let open = null;
  curve.value.forEach((value, index) => {
    if (!known(value)) open = null;
    else if (open) open.push(index);
    else made.push((open = [index]));
  });
  return made;
}
