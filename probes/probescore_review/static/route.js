/** Keeps what is shown in the page's address, so that each view has a URL: #/<run>/<view>/<item>?<settings>. */

/**
 * Returns the route that the page's address names.
 * @returns {{run: string, view: string, item: string|null, settings: Object<string, string>}}
 */
export function route() {
  const [path, settings = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const parts = path.split("/").map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part; // not written by this page
    }
  });
  return { run: parts[0] ?? "", view: parts[1] ?? "", item: parts.length > 2 ? parts.slice(2).join("/") : null, settings: Object.fromEntries(new URLSearchParams(settings)) };
}

/** Returns the address of a view. */
export function address(run, view, item = null, settings = {}) {
  const given = Object.entries(settings).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const path = [run, view, ...(item === null ? [] : [item])].map((part) => encodeURIComponent(part)).join("/");
  return `#/${path}${given.length ? `?${new URLSearchParams(given)}` : ""}`;
}

/** Goes to a view. */
export function go(...place) {
  location.hash = address(...place);
}

/** Keeps settings of the view that is shown in its address, without a new entry in the history. */
export function remember(settings) {
  const now = route();
  history.replaceState(null, "", address(now.run, now.view, now.item, { ...now.settings, ...settings }));
}

const SOON_MS = 150;
let later = null;

/**
 * Does what `remember` does: at once, or where it was called a moment ago, once no other call has come for a moment. Browsers limit how often the
 * address changes. Nothing is done if another view is shown by then.
 */
export function rememberSoon(settings) {
  const asked = route();
  const waiting = later !== null;
  if (!waiting) remember(settings);
  clearTimeout(later);
  later = setTimeout(() => {
    later = null;
    const now = route();
    if (waiting && now.run === asked.run && now.view === asked.view && now.item === asked.item) remember(settings);
  }, SOON_MS);
}
