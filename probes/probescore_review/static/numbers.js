/** Writes numbers for people. */

/** Returns a number with three digits or so; "–" if there is none. */
export function written(number) {
  if (number === null || number === undefined || Number.isNaN(number)) return "–";
  if (!Number.isFinite(number)) return number > 0 ? "∞" : "−∞";
  const size = Math.abs(number);
  const text = number === 0 ? "0" : size >= 1e5 || size < 1e-3 ? number.toExponential(2) : Number.isInteger(number) ? String(number) : number.toFixed(size >= 100 ? 1 : size >= 1 ? 2 : 3);
  return text.replace("-", "−");
}

/** Returns a number with its sign. */
export const signed = (number) => (number > 0 ? `+${written(number)}` : written(number));

/** Returns a share in per cent. */
export const share = (number) => (number === null || number === undefined ? "–" : `${written(Number((100 * number).toPrecision(3)))}%`);

/** Returns a count with thousands apart. */
export const count = (number) => (number ?? 0).toLocaleString("en");

/** Returns a value of any kind on one line: a number, a number with its interval, a list, a text. */
export function anything(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "number") return written(value);
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) {
    if (value.length === 3 && value.every((each) => typeof each === "number") && value[1] <= value[0] && value[0] <= value[2]) return `${written(value[0])} (${written(value[1])} to ${written(value[2])})`;
    return value.map(anything).join(", ");
  }
  if (typeof value === "object" && typeof value.value === "number" && "low" in value) return `${written(value.value)} (${written(value.low)} to ${written(value.high)})`;
  if (typeof value === "object") return Object.entries(value).map(([name, each]) => `${name} ${anything(each)}`).join("; ");
  return String(value);
}
