// What the page's controls do.

import {PoolView, duration, pair} from "./pool.js";
import {RunError, run} from "./run.js";
import {Terminal} from "./terminal.js";

const EXAMPLES = {
  "Hello": `echo "Hello from $(hostname)"
echo "This goes to standard error." >&2`,
  "Output as it comes": `for i in 1 2 3 4 5; do
  echo "step $i of 5"
  sleep 0.5
done`,
  "Colours and progress": `for i in $(seq 0 5 100); do
  printf '\\r\\e[K\\e[32m%-20s\\e[0m %3d %%' "$(printf '%*s' $((i / 5)) '' | tr ' ' '#')" "$i"
  sleep 0.05
done
echo
for c in $(seq 31 36); do printf '\\e[%sm colour %s \\e[1m bold \\e[0m\\n' "$c" "$c"; done
for c in $(seq 16 6 231); do printf '\\e[48;5;%sm  ' "$c"; done; printf '\\e[0m\\n'
for c in $(seq 0 6 215); do printf '\\e[48;2;%s;90;%sm  ' "$c" $((215 - c)); done; printf '\\e[0m\\n'`,
  "A failure": `set -e
echo "before"
ls /nowhere
echo "never printed"`,
  "Over its time": `echo "This takes longer than a run may."
sleep 3600`,
  "Where am I?": `id
uname -srm
nproc
df -h / | tail -1`,
};
const OUR_ENDINGS = {
  timeout: "its time was over",
  "worker-lost": "its machine went away",
  "output-limit": "it wrote more than it may",
  "not-started": "bash could not be started",
};

const at = (id) => document.getElementById(id);
const script = at("script");
const pool = new PoolView();
const terminal = new Terminal(at("output"), showDropped);
let current = null; // the run that is under way

// Running

async function start() {
  if (current !== null) return;
  const mine = (current = {abort: new AbortController(), sent: performance.now(), begun: null, facts: []});
  switchButtons(true);
  terminal.clear();
  for (const id of ["facts", "problem"]) at(id).hidden = true;
  say("Waiting for a machine.");
  mine.ticking = setInterval(() => tick(mine), 100);
  tick(mine);
  pool.busy = true;
  pool.look();
  try {
    const exit = await run(script.value, mine.abort.signal, {
      begun: (headers) => begin(mine, headers),
      output: (stream, text) => terminal.write(stream, text),
    });
    finish(mine, exit);
  } catch (error) {
    if (error.name === "AbortError") stopped(mine);
    else fail(mine, error);
  } finally {
    clearInterval(mine.ticking);
    current = null;
    switchButtons(false);
    pool.busy = false;
    pool.look();
  }
}

function begin(mine, headers) {
  mine.begun = performance.now();
  mine.facts.push(["Waited", duration(mine.begun - mine.sent)]);
  mine.origin = [["Machine", headers.get("Worker")], ["Run", headers.get("Run-Id")]].filter(([, value]) => value);
  say("Running.");
  tick(mine);
}

function tick(mine) {
  const passed = performance.now() - (mine.begun ?? mine.sent);
  const time = `${(passed / 1000).toFixed(1)} s`;
  const waiting = pool.latest?.queue.waiting;
  const line = waiting ? ` · ${waiting} waiting in line` : "";
  if (mine.begun === null) state("waiting", `Waiting for a machine… ${time}${line}`);
  else state("running", `Running… ${time}`);
}

function finish(mine, exit) {
  const good = exit.code === 0 && !exit.reason;
  const ended = exit.reason ? `Ended: ${OUR_ENDINGS[exit.reason] ?? exit.reason}` : exit.signal ? "Killed" : good ? "Done" : "Failed";
  const signal = exit.signal ? ` (${exit.signal})` : "";
  state(good ? "good" : "bad", `${ended} · exit code ${exit.code}${signal}`);
  mine.facts.unshift(["Exit code", String(exit.code)]);
  const more = [
    ["Signal", exit.signal],
    ["Reason", exit.reason],
    ["Ran", exit.wall_ms === undefined ? duration(performance.now() - mine.begun) : duration(exit.wall_ms)],
    ["Processor time", exit.cpu_ms === undefined ? null : duration(exit.cpu_ms)],
    ["Memory", exit.max_rss_kb === undefined ? null : size(1024 * exit.max_rss_kb)],
    ["Truncated", exit.truncated ? `yes, ${size(exit.dropped_bytes ?? 0)} were dropped by the limit on output` : null],
  ];
  showFacts(mine, more);
  const {stdout, stderr} = terminal.lines;
  say(`${ended}. Exit code ${exit.code}${signal}. ${stdout + stderr} lines of output, ${stderr} of them from standard error.`);
}

function stopped(mine) {
  const after = duration(performance.now() - mine.sent);
  state("ended", `Cancelled after ${after}`);
  if (mine.begun !== null) showFacts(mine, []);
  say("Cancelled. The script was ended.");
}

function fail(mine, error) {
  if (!(error instanceof RunError)) console.error(error);
  state("bad", mine.begun === null ? "Not run" : "Broken off");
  const again = error.retryAfter === undefined || error.retryAfter === null ? "" : ` Try again in ${error.retryAfter} s.`;
  at("problem").textContent = sentence(error.message) + again;
  at("problem").hidden = false;
  if (mine.begun !== null) showFacts(mine, []);
  say(at("problem").textContent);
}

// What is shown

function state(name, text) {
  at("state").dataset.state = name;
  at("state").textContent = text;
}

function showFacts(mine, more) {
  const facts = [...mine.facts, ...more, ...(mine.origin ?? [])].filter(([, value]) => value);
  at("facts").replaceChildren(...facts.map(([name, value]) => pair(name, value)));
  at("facts").hidden = false;
}

function showDropped({droppedRows, droppedCharacters}) {
  at("dropped").hidden = droppedRows === 0;
  at("dropped").textContent =
    `Only the latest output is shown: ${droppedRows.toLocaleString("en")} earlier lines ` +
    `(${size(droppedCharacters)}) came and were let go.`;
}

/** Tells those who listen; said anew even if it is the same again. */
function say(text) {
  at("said").textContent = "";
  setTimeout(() => (at("said").textContent = text), 50);
}

function switchButtons(running) {
  const focused = document.activeElement;
  at("run").disabled = running;
  at("cancel").disabled = !running;
  if (focused === at(running ? "run" : "cancel")) at(running ? "cancel" : "run").focus();
}

function size(bytes) {
  if (bytes < 1000) return `${bytes} bytes`;
  if (bytes < 999_500) return `${(bytes / 1e3).toPrecision(3)} kB`;
  return `${(bytes / 1e6).toPrecision(3)} MB`;
}

const sentence = (text) => (/[.?!]$/.test(text) ? text : `${text}.`);

// Taking the script elsewhere

function encode(text) {
  const bytes = new TextEncoder().encode(text);
  let binary = "";
  for (let start = 0; start < bytes.length; start += 8192)
    binary += String.fromCharCode(...bytes.subarray(start, start + 8192));
  return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

function decode(text) {
  const binary = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  return new TextDecoder("utf-8", {fatal: true}).decode(Uint8Array.from(binary, (character) => character.charCodeAt(0)));
}

function readLink() {
  if (!location.hash.startsWith("#script=")) return;
  const notice = at("from-link");
  try {
    change(decode(location.hash.slice("#script=".length)));
    notice.textContent = "This script came with the link you opened. Read it before you run it.";
  } catch {
    notice.textContent = "The link you opened is damaged: its script cannot be read.";
  }
  notice.hidden = false;
}

function change(text) {
  script.value = text;
  showCommand();
}

/** In single quotes a shell changes nothing; a quote ends them, stands escaped, and begins them again. */
function command() {
  const address = new URL("run", location.href);
  return `curl -sN '${address.origin}${address.pathname}' --data-raw '${script.value.replaceAll("'", "'\\''")}'`;
}

function showCommand() {
  at("command").textContent = command();
}

async function copy(button, text) {
  const label = button.dataset.label ?? (button.dataset.label = button.textContent);
  const copied = await toClipboard(text);
  button.textContent = copied ? "Copied" : "Not copied";
  say(copied ? "Copied." : "The browser did not let this be copied.");
  clearTimeout(button.restoring);
  button.restoring = setTimeout(() => (button.textContent = label), 1500);
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // There is no clipboard for pages that came without TLS from another host; there is the old way.
    const field = document.createElement("textarea");
    const focused = document.activeElement;
    field.value = text;
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return copied;
  }
}

// Composition

for (const name of Object.keys(EXAMPLES)) at("examples").append(new Option(name, name));
at("examples").addEventListener("change", ({target}) => {
  if (!target.value) return;
  change(EXAMPLES[target.value]);
  at("from-link").hidden = true;
});
script.addEventListener("input", () => {
  at("examples").value = "";
  showCommand();
});
at("run").addEventListener("click", start);
at("cancel").addEventListener("click", () => current?.abort.abort());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  start();
});
at("link").addEventListener("click", ({currentTarget}) => {
  history.replaceState(null, "", `#script=${encode(script.value)}`);
  copy(currentTarget, location.href);
});
at("curl").addEventListener("click", ({currentTarget}) => copy(currentTarget, command()));
window.addEventListener("hashchange", readLink);

if (!script.value) script.value = EXAMPLES.Hello;
readLink();
showCommand();
pool.start();
