/** Makes texts of models safe and honest to show: what cannot be seen is spelt out, and what is very long is cut. */

// Cc: control characters; Cf: zero-width and bidirectional; Co, Cn, Cs: no shape; Zl, Zp: line breaks in a browser
const UNSEEN = /[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Cs}\p{Zl}\p{Zp}]/gu;
const MOST_MARKS = 8;
const STACKED = new RegExp(`(\\p{M}{${MOST_MARKS}})\\p{M}+`, "gu"); // marks piled on one letter until they cover the lines around it

const code = (character) => `⟨${character.codePointAt(0).toString(16).toUpperCase().padStart(2, "0")}⟩`;
const unpiled = (text) => text.replace(STACKED, "$1⟨…⟩");

/** Returns a text with its invisible characters as their code points, such as ⟨202E⟩; line breaks and tabs stay as they are. */
export function spelt(text) {
  return unpiled(String(text)).replace(UNSEEN, (character) => (character === "\n" || character === "\t" ? character : code(character)));
}

/** Returns a text with its invisible characters as their code points, and marks before line breaks and tabs. */
export function visible(text) {
  return unpiled(String(text)).replace(UNSEEN, (character) => (character === "\n" ? "↵\n" : character === "\t" ? "⇥\t" : code(character)));
}

/** Returns a text on one line. */
export function oneLine(text) {
  return spelt(String(text).replace(/\s+/g, " "));
}

/** Returns the first characters of a text, never half of one. */
export function head(text, length) {
  if (text.length <= length) return text;
  const last = text.charCodeAt(length - 1);
  return text.slice(0, last >= 0xd800 && last < 0xdc00 ? length - 1 : length);
}
