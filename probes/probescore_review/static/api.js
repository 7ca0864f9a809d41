/** Speaks with the server of this page, and with nobody else. */

let token = null;

/** What the server refused, in its own words. */
export class Refusal extends Error {
  constructor(sentence, status) {
    super(sentence);
    this.status = status;
  }
}

async function answered(path, options) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", ...options });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Refusal("The server does not answer. Is `probescore review` still running?", 0);
  }
  let body = null;
  try {
    body = await response.json();
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
  }
  if (response.ok && body !== null) return body;
  const sentence = typeof body?.error === "string" ? body.error : typeof body?.detail === "string" ? body.detail : `The server answered ${response.status}.`;
  throw new Refusal(sentence, response.status);
}

/** Returns what the server says at a path. */
export const get = (path, signal) => answered(path, { signal });

/** Returns what the server says at a path, or null where it has no such path. */
export async function getIfThere(path) {
  try {
    return await get(path);
  } catch (problem) {
    if (problem.status === 404 || problem.status === 405) return null;
    throw problem;
  }
}

/** Sends a change to the server. A token that the server no longer knows (it was started again) is asked for anew, once. */
export async function change(method, path, body) {
  for (let attempt = 0; ; attempt++) {
    token ??= (await get("api/session")).token;
    try {
      return await answered(path, { method, headers: { "Content-Type": "application/json", "X-Probescore-Review": token }, body: JSON.stringify(body ?? {}) });
    } catch (problem) {
      if (problem.status !== 403 || attempt) throw problem;
      token = null;
    }
  }
}

/** Returns the path of something of a run. */
export const ofRun = (run, ...parts) => ["api/runs", run, ...parts].map((part, index) => (index ? encodeURIComponent(part) : part)).join("/");

/** Returns a query of the names whose values are given. */
export function query(values) {
  const given = Object.entries(values).filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== false);
  return given.length ? `?${new URLSearchParams(given.map(([name, value]) => [name, value === true ? "1" : value]))}` : "";
}
