/** Knows the probes of a run, their readings (whose activations a probe read), and the scale of their colours. */

export const SIDE_BY_SIDE = "side by side";
const FROZEN = "frozen";

/** Returns the name under which the server keeps the scores of a probe on a reading. */
export const keyOf = (probe, reading) => `${probe}:${reading}`;

/** Returns the ways to look at a probe: all readings side by side, one of them, or the difference of two. */
export function waysOf(probe) {
  const names = probe.readings.length ? probe.readings : [FROZEN];
  if (names.length === 1) return [...names];
  const first = names.includes(FROZEN) ? FROZEN : names[0];
  return [SIDE_BY_SIDE, ...names, ...names.filter((name) => name !== first).map((name) => `${name} − ${first}`)];
}

/** Returns what each pane of a way shows: a reading, or with `base` the difference to it. */
export function panesOf(probe, way) {
  const names = probe.readings.length ? probe.readings : [FROZEN];
  if (way === SIDE_BY_SIDE) return names.map((reading) => ({ reading, base: null, title: reading }));
  const [reading, base] = way.split(" − ");
  return [{ reading, base: base ?? null, title: way }];
}

/** Returns a token's score in a pane; null if there is none. */
export function scoreOf(token, probe, pane) {
  const score = token.scores?.[keyOf(probe.key, pane.reading)] ?? null;
  if (pane.base === null || score === null) return score;
  const base = token.scores[keyOf(probe.key, pane.base)] ?? null;
  return base === null ? null : score - base;
}

/** Returns a probe's threshold on a reading, as {reduction, value}; null if it has none. */
export function thresholdOf(probe, reading = FROZEN) {
  const value = probe.thresholds?.[reading];
  return typeof value === "number" ? { reduction: probe.reductions?.[reading] ?? "score", value } : null;
}

/**
 * Returns the linear scale of the colours of a probe's tokens: 0 at its threshold (of differences at 0), ±1 where all but the outermost 2% of the
 * scores end. All readings have one scale, so that a colour means one score.
 */
export function scaleOf(tokens, probe, pane) {
  const alike = pane.base === null ? panesOf(probe, SIDE_BY_SIDE) : [pane];
  const centre = pane.base === null ? thresholdOf(probe)?.value ?? 0 : 0;
  const away = [];
  for (const each of alike) for (const token of tokens) {
    const score = scoreOf(token, probe, each);
    if (score !== null && Number.isFinite(score)) away.push(Math.abs(score - centre));
  }
  away.sort((a, b) => a - b);
  const reach = away.length ? away[Math.min(away.length - 1, Math.floor(0.98 * away.length))] : 0;
  return { centre, reach: reach > 0 ? reach : 1 };
}

/** Returns a score's place on a scale, from -1 to 1; 0 for none. */
export function placeOn(scale, score) {
  if (score === null || Number.isNaN(score)) return 0;
  return Math.max(-1, Math.min(1, (score - scale.centre) / scale.reach));
}
