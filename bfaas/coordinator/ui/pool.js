// The view of the pool: asks GET status again and again, and shows what it says.

const BUSY = 1000; // milliseconds between two questions while a run is under way
const CALM = 4000;
const WITHOUT = 60_000; // a coordinator that has no status gets it hardly while this page is open

const SVG = "http://www.w3.org/2000/svg";
const MEANINGS = {
  creating: "being made", adopting: "being reclaimed", stopped: "stopped, clean", starting: "starting",
  ready: "ready at once", suspended: "frozen, ready soon", resuming: "thawing", running: "running a script",
  stopping: "being wiped", destroying: "being destroyed",
};

const at = (id) => document.getElementById(id);

/** Keeps the view fresh. `busy` is set by whoever runs something; `latest` is the last status, or null. */
export class PoolView {
  busy = false;
  latest = null;
  #timer = null;
  #asked = 0;

  start() {
    document.addEventListener("visibilitychange", () => this.look());
    this.look();
  }

  /** Asks now. */
  async look() {
    clearTimeout(this.#timer);
    if (document.hidden) return;
    const asked = (this.#asked += 1);
    let wait = CALM;
    try {
      const response = await ask();
      if (response.status === 404) wait = WITHOUT;
      if (!response.ok) throw new Error(`the coordinator answers ${response.status}`);
      const status = await response.json();
      if (asked !== this.#asked) return;
      this.latest = status;
      show(status);
    } catch (error) {
      if (asked !== this.#asked) return;
      this.latest = null;
      at("pool").hidden = true;
      at("pool-state").textContent =
        wait === WITHOUT ? "This coordinator does not tell about its machines." : `Not known: ${error.message}.`;
    }
    if (wait === CALM && this.busy) wait = BUSY;
    this.#timer = setTimeout(() => this.look(), wait);
  }
}

async function ask() {
  try {
    return await fetch("status", {cache: "no-store", signal: AbortSignal.timeout(10_000)});
  } catch {
    throw new Error("the coordinator could not be reached");
  }
}

/** Milliseconds, for a person. */
export function duration(ms) {
  if (!Number.isFinite(ms)) return "?";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(ms < 9950 ? 2 : 1)} s`;
  const seconds = Math.round(ms / 1000);
  return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
}

function show({pool, queue, runs, max_req_time_ms: limit, draining}) {
  at("pool").hidden = false;
  const standby = pool.standby ? `, ${pool.standby} kept ready` : "";
  at("pool-state").textContent = draining
    ? "Shutting down: takes no more runs."
    : `${pool.size} at the most${standby}. A run may take ${duration(limit).replace(/\.?0+ s$/, " s")}.`;
  showMachines(pool);
  const line = [["Running", runs.running], ["Waiting", `${queue.waiting} of ${queue.limit}`]];
  if (queue.waiting) line.push(["Expected wait", duration(queue.expected_wait_ms)]);
  at("queue").replaceChildren(...line.map(([name, value]) => pair(name, value)));
  showRuns(runs.recent);
}

function showMachines({size, machines}) {
  const phases = Object.entries(machines);
  const tiles = phases.flatMap(([phase, count]) => Array(Math.min(count, 200)).fill(phase));
  while (tiles.length < Math.min(size, 200)) tiles.push("none");
  at("tiles").replaceChildren(...tiles.map((phase) => element("i", "", `tile ${phase}`)));
  const rows = phases.map(([phase, count]) => {
    const row = element("li", "");
    row.append(element("i", "", `tile ${phase}`), `${count} ${phase}`, element("small", MEANINGS[phase] ?? ""));
    return row;
  });
  if (!rows.length) rows.push(element("li", "none at the moment; they are made when they are wanted"));
  at("phases").replaceChildren(...rows);
}

function showRuns(recent) {
  const times = recent.map((run) => run.run_ms).sort((one, other) => one - other);
  const longest = times.at(-1) ?? 0;
  const says = times.length
    ? `Latest ${times.length}: median ${duration(times[times.length >> 1])}, longest ${duration(longest)}.`
    : "None yet.";
  at("chart-says").textContent = says;
  at("chart").setAttribute("aria-label", `How long recent runs waited and ran. ${says}`);
  at("chart").toggleAttribute("hidden", !times.length);
  at("recent").hidden = !times.length;
  const highest = Math.max(1, ...recent.map((run) => run.wait_ms + run.run_ms));
  at("chart").replaceChildren(...recent.slice(-50).flatMap((run, place, all) => bars(run, 50 - all.length + place, highest)));
  const now = Date.now();
  at("recent").tBodies[0].replaceChildren(...recent.slice(-8).reverse().map((run) => {
    const row = element("tr", "", good(run) ? "" : "bad");
    const ended = element("td", ago(now - 1000 * run.ended));
    ended.title = new Date(1000 * run.ended).toLocaleString();
    row.append(ended, element("td", run.ending), element("td", duration(run.wait_ms)), element("td", duration(run.run_ms)));
    return row;
  }));
}

/** A run's two bars: how long it ran, and on top of that how long it waited. */
function bars(run, place, highest) {
  const tall = (ms) => (62 * ms) / highest;
  const ran = Math.max(1, tall(run.run_ms));
  const waited = tall(run.wait_ms);
  return [
    bar(place, 64 - ran, ran, good(run) ? "ran" : "ran bad", run),
    bar(place, 64 - ran - waited, waited, "waited", run),
  ];
}

function bar(place, y, height, name, run) {
  const rect = document.createElementNS(SVG, "rect");
  for (const [key, value] of Object.entries({x: 5 * place, y: y.toFixed(1), width: 4, height: height.toFixed(1), class: name}))
    rect.setAttribute(key, value);
  const title = document.createElementNS(SVG, "title");
  title.textContent = `${run.ending}: waited ${duration(run.wait_ms)}, ran ${duration(run.run_ms)}`;
  rect.append(title);
  return rect;
}

const good = (run) => run.ending === "exit 0";

function ago(ms) {
  const seconds = Math.max(0, Math.round(ms / 1000));
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 172_800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86_400)} days ago`;
}

/** An element with text, and only text, in it. */
export function element(name, text, classes = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (classes) made.className = classes;
  return made;
}

/** A name and its value, of a description list. */
export function pair(name, value) {
  const made = document.createElement("div");
  made.append(element("dt", name), element("dd", value));
  return made;
}
