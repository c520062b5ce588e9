// The runs of this tab, in the tab's session storage: they survive a reload, and never leave the browser.

import {byId, element} from "./dom.js";
import {duration} from "./pool.js";
import {load, store} from "./storage.js";

const KEY = "runs";
const MAX_RUNS = 50;

/** Shows the list of runs. `onLoad(request)` is called when the user chooses one to edit again. */
export class History {
  #runs = read();
  #onLoad;

  constructor(onLoad) {
    this.#onLoad = onLoad;
    byId("clear-history").addEventListener("click", () => {
      this.#runs = [];
      this.#save();
    });
    this.#draw();
  }

  /** Adds a run: its request, its state and result for display, and when it ended. */
  add(run) {
    this.#runs = [...this.#runs, run].slice(-MAX_RUNS);
    this.#save();
  }

  /** Sets the times of a run that was added. */
  setTimes(run, waited, ran) {
    Object.assign(run, {waited, ran});
    this.#save();
  }

  #save() {
    store(KEY, this.#runs);
    this.#draw();
  }

  #draw() {
    byId("history").hidden = !this.#runs.length;
    byId("runs").replaceChildren(...this.#runs.toReversed().map((run) => this.#item(run)));
  }

  #item(run) {
    const item = element("li", "");
    const button = element("button", firstLine(run.request.script), "quiet script");
    button.type = "button";
    button.title = "Edit this script again";
    button.addEventListener("click", () => this.#onLoad(run.request));
    const result = element("span", run.result, "state");
    result.dataset.state = run.state;
    const times = [["waited", run.waited], ["ran", run.ran]].filter(([, ms]) => Number.isFinite(ms));
    const when = new Date(run.endedAt);
    const details = element("small", [when.toLocaleTimeString(), ...times.map(([name, ms]) => `${name} ${duration(ms)}`)].join(" · "));
    details.title = when.toLocaleString();
    item.append(button, result, details);
    return item;
  }
}

function firstLine(script) {
  const [first, ...others] = script.trim().split("\n");
  return (first || "(empty script)") + (others.length ? " …" : "");
}

function read() {
  const runs = load(KEY);
  return Array.isArray(runs) ? runs.filter((run) => typeof run?.request?.script === "string") : [];
}
