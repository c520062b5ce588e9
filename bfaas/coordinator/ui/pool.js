// The view of the pool: polls GET /status, and shows it.

import {fetchWithToken} from "./access.js";
import {byId, descriptionItem, element} from "./dom.js";

// Milliseconds between two polls: just after a run, while something changes, otherwise, and for a coordinator
// without /status or one that requires an access token.
const QUICK_INTERVAL = 250;
const BUSY_INTERVAL = 1000;
const IDLE_INTERVAL = 4000;
const NO_STATUS_INTERVAL = 60_000;

const NO_STATUS = {
  401: "Shown to those who have an access token.",
  404: "This coordinator does not report its machines.",
};

const SVG = "http://www.w3.org/2000/svg";
const PHASES = {
  creating: "new machine",
  adopting: "left by an earlier start",
  stopped: "wiped, starts on demand",
  starting: "booting",
  ready: "waiting for a script",
  suspended: "paused, resumes quickly",
  resuming: "waking up",
  running: "executing a script",
  stopping: "being wiped",
  destroying: "being removed",
};

// Milliseconds after a run during which its machine is usually wiped.
const WIPE_TIME = 1500;

const SETTLED = ["stopped", "ready", "suspended"];
const SANDBOXES = {
  "virtual machine": "Each script runs in a virtual machine of its own.",
  "bubblewrap": "Sandbox: bubblewrap, without a network.",
  "none": "No sandbox: scripts can read files of this host and reach its network.",
};

/**
 * Keeps the view up to date. `latest` is the last status, or null. During a run, `request` is its Request-Id.
 *
 * `onStatus(status)` is called for each status.
 */
export class PoolView {
  latest = null;
  #onStatus;
  #request = null;
  #quickUntil = 0;
  #timer = null;
  #requests = 0;

  constructor(onStatus) {
    this.#onStatus = onStatus;
  }

  /** Polls more often, and for the position of a request, from now on. */
  follow(request) {
    this.#request = request;
    this.refresh();
  }

  /** The run has ended: polls often until its machine is wiped. */
  unfollow() {
    this.#request = null;
    this.#quickUntil = performance.now() + WIPE_TIME;
    this.refresh();
  }

  start() {
    document.addEventListener("visibilitychange", () => this.refresh());
    this.refresh();
  }

  /** Polls now. */
  async refresh() {
    clearTimeout(this.#timer);
    if (document.hidden) return;
    const number = (this.#requests += 1);
    let interval = IDLE_INTERVAL;
    try {
      const response = await fetchStatus(this.#request);
      if (!response.ok) throw new StatusError(response.status);
      const status = await response.json();
      if (number !== this.#requests) return;
      this.latest = status;
      show(status);
      this.#onStatus(status);
      interval = this.#interval(status);
    } catch (error) {
      if (number !== this.#requests) return;
      this.latest = null;
      byId("pool").hidden = true;
      if (error.status in NO_STATUS) interval = NO_STATUS_INTERVAL;
      byId("pool-state").textContent = NO_STATUS[error.status] ?? `Not available: ${error.message}.`;
    }
    this.#timer = setTimeout(() => this.refresh(), interval);
  }

  #interval({pool, queue}) {
    const changing = queue.waiting || Object.keys(pool.machines).some((phase) => !SETTLED.includes(phase));
    if (changing && performance.now() < this.#quickUntil) return QUICK_INTERVAL;
    return changing || this.#request !== null ? BUSY_INTERVAL : IDLE_INTERVAL;
  }
}

class StatusError extends Error {
  constructor(status) {
    super(`the coordinator responded with status ${status}`);
    this.status = status;
  }
}

async function fetchStatus(request) {
  const query = request === null ? "" : `?request=${encodeURIComponent(request)}`;
  try {
    return await fetchWithToken(`status${query}`, {signal: AbortSignal.timeout(10_000)});
  } catch {
    throw new Error("the coordinator could not be reached");
  }
}

/** Formats milliseconds. */
export function duration(ms) {
  if (!Number.isFinite(ms)) return "?";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(ms < 9950 ? 2 : 1)} s`;
  const seconds = Math.round(ms / 1000);
  return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
}

/** Formats a limit in milliseconds, without trailing zeros. */
export const limitText = (ms) => duration(ms).replace(/(\.\d*?)0+ s$/, "$1 s").replace(". s", " s");

function show({version, sandbox, pool, queue, runs, max_req_time_ms: limit, draining}) {
  byId("version").textContent = `bfaas ${version}`;
  byId("sandbox").textContent = SANDBOXES[sandbox] ?? `Sandbox: ${sandbox}.`;
  byId("sandbox").className = sandbox === "none" ? "notice" : "hint";
  byId("pool").hidden = false;
  const standby = pool.standby ? `, ${pool.standby} kept ready` : "";
  byId("pool-state").textContent = draining
    ? "Shutting down: no new runs are accepted."
    : `Up to ${pool.size}${standby}. Time limit: ${limitText(limit)}.`;
  showMachines(pool);
  const rows = [["Running", runs.running], ["Waiting", `${queue.waiting} of ${queue.limit}`]];
  if (queue.waiting) rows.push(["Expected wait", duration(queue.expected_wait_ms)]);
  byId("queue").replaceChildren(...rows.map(([term, value]) => descriptionItem(term, value)));
  showRuns(runs.recent);
}

function showMachines({size, machines}) {
  const phases = Object.entries(machines);
  const tiles = phases.flatMap(([phase, count]) => Array(Math.min(count, 200)).fill(phase));
  while (tiles.length < Math.min(size, 200)) tiles.push("none");
  byId("tiles").replaceChildren(...tiles.map((phase) => element("i", "", `tile ${phase}`)));
  const rows = phases.map(([phase, count]) => {
    const row = element("li", "");
    row.append(element("i", "", `tile ${phase}`), `${count} ${phase}`, element("small", PHASES[phase] ?? ""));
    return row;
  });
  if (!rows.length) rows.push(element("li", "None at the moment: machines are created on demand."));
  byId("phases").replaceChildren(...rows);
}

function showRuns(recent) {
  const times = recent.map((run) => run.run_ms).sort((one, other) => one - other);
  const summary = times.length
    ? `Last ${times.length}: median ${duration(times[times.length >> 1])}, max ${duration(times.at(-1))}`
    : "None yet.";
  byId("chart-summary").textContent = summary;
  byId("chart").setAttribute("aria-label", `Waiting time and run time of recent runs. ${summary}`);
  byId("chart").toggleAttribute("hidden", !times.length);
  byId("recent").hidden = !times.length;
  const highest = Math.max(1, ...recent.map((run) => run.wait_ms + run.run_ms));
  byId("chart").replaceChildren(...recent.slice(-50).flatMap((run, index, shown) => bars(run, 50 - shown.length + index, highest)));
  const now = Date.now();
  byId("recent").tBodies[0].replaceChildren(...recent.slice(-8).reverse().map((run) => {
    const row = element("tr", "", good(run) ? "" : "bad");
    const finished = element("td", ago(now - 1000 * run.ended_at));
    finished.title = new Date(1000 * run.ended_at).toLocaleString();
    row.append(finished, element("td", resultText(run)), element("td", duration(run.wait_ms)), element("td", duration(run.run_ms)));
    return row;
  }));
}

/** A run's two bars: its run time, and above it its waiting time. */
function bars(run, index, highest) {
  const height = (ms) => (62 * ms) / highest;
  const ran = Math.max(1, height(run.run_ms));
  const waited = height(run.wait_ms);
  return [
    bar(index, 64 - ran, ran, good(run) ? "ran" : "ran bad", run),
    bar(index, 64 - ran - waited, waited, "waited", run),
  ];
}

function bar(index, y, height, name, run) {
  const rect = document.createElementNS(SVG, "rect");
  for (const [key, value] of Object.entries({x: 5 * index, y: y.toFixed(1), width: 4, height: height.toFixed(1), class: name}))
    rect.setAttribute(key, value);
  const title = document.createElementNS(SVG, "title");
  title.textContent = `${resultText(run)}: waited ${duration(run.wait_ms)}, ran ${duration(run.run_ms)}`;
  rect.append(title);
  return rect;
}

const good = (run) => run.outcome === "exit 0";
const resultText = (run) => run.outcome.replaceAll("-", " ");

function ago(ms) {
  const seconds = Math.max(0, Math.round(ms / 1000));
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 172_800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86_400)} days ago`;
}
