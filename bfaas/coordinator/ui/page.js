// The page: its controls, and the state of the current run.

import {hasToken, listen} from "./access.js";
import {byId, descriptionItem} from "./dom.js";
import {Downloads} from "./downloads.js";
import {Editor} from "./editor.js";
import {History} from "./history.js";
import {PoolView, duration, limitText} from "./pool.js";
import {FieldError, RequestFields, curlCommand, requestBody, size} from "./request.js";
import {RunError, runScript} from "./run.js";
import {load, store} from "./storage.js";
import {Terminal} from "./terminal.js";

const EXAMPLES = {
  "Hello": `echo "Hello from $(hostname)"
echo "This goes to standard error." >&2`,
  "Streaming output": `for i in 1 2 3 4 5; do
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
  "Failure": `set -e
echo "before"
ls /nonexistent
echo "not reached"`,
  "Time limit exceeded": `echo "This runs until the time limit."
sleep 3600`,
  "About the machine": `id
uname -srm
nproc
df -h / | tail -1`,
};
const REASONS = {
  "worker-lost": "The machine was lost",
  "output-limit": "Output limit exceeded",
  "not-started": "Bash could not be started",
};
const PROBLEMS = {
  "not-found": "no such file",
  "directory": "a directory; its files are DIRECTORY/*",
  "symbolic-link": "a symbolic link, which is not followed",
  "special-file": "not a regular file",
  "invalid-name": "its name is not valid",
  "output-limit": "beyond the limit of output",
  "too-many-files": "beyond the limit of files",
  "unreadable": "the script's user cannot read it",
  "changed": "changed while it was read",
};

const editor = new Editor(byId("script"), byId("line-numbers"));
const fields = new RequestFields(changed);
const history_ = new History(edit);
const downloads = new Downloads(byId("downloads"));
const pool = new PoolView(showTimes);
const terminal = new Terminal(byId("output"), showDropped);
let current = null; // the active run
let latest = null; // the run whose result is shown, until its times are known

// Running

async function start() {
  if (current !== null) return;
  const run = (current = {
    abort: new AbortController(),
    name: randomName(),
    request: {script: editor.text, ...fields.values},
    sentAt: performance.now(),
    startedAt: null,
    details: {},
  });
  latest = null;
  switchButtons(true);
  terminal.clear();
  downloads.clear();
  byId("output").dataset.placeholder = "";
  for (const id of ["details", "problem"]) byId(id).hidden = true;
  announce("Waiting for a machine.");
  run.ticker = setInterval(() => showProgress(run), 100);
  showProgress(run);
  try {
    const {body, headers} = await requestBody(editor.text, fields.values, fields.files);
    pool.follow(run.name);
    const exit = await runScript({body, headers: {...headers, "Request-Id": run.name}}, run.abort.signal, {
      started: (headers) => started(run, headers),
      output: (stream, text) => terminal.write(stream, text),
      file: (data) => downloads.add(data),
    });
    finished(run, exit);
  } catch (error) {
    if (error.name === "AbortError") cancelled(run);
    else failed(run, error);
  } finally {
    clearInterval(run.ticker);
    current = null;
    latest = run;
    run.entry = {request: run.request, state: byId("state").dataset.state, result: run.result, endedAt: Date.now()};
    history_.add(run.entry);
    byId("output").dataset.placeholder = "No output.";
    switchButtons(false);
    pool.unfollow();
  }
}

/** A name that no other request has. `crypto.randomUUID` is for secure contexts only. */
function randomName() {
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (number) => number.toString(16).padStart(8, "0")).join("");
}

function started(run, headers) {
  run.startedAt = performance.now();
  run.id = headers.get("Run-Id");
  run.details["Machine"] = headers.get("Worker");
  run.details["Run ID"] = run.id;
  announce("Running.");
  showProgress(run);
}

/**
 * Shows how long the latest run waited and ran, as the coordinator has measured it: the list of recent runs has
 * the same values.
 */
function showTimes(status) {
  if (latest === null) return;
  const measured = status.runs.recent.find((run) => run.id === latest.id);
  if (!measured) return;
  Object.assign(latest.details, {"Waited": duration(measured.wait_ms), "Ran": duration(measured.run_ms)});
  showDetails(latest);
  history_.setTimes(latest.entry, measured.wait_ms, measured.run_ms);
  latest = null;
}

function showProgress(run) {
  const elapsed = performance.now() - (run.startedAt ?? run.sentAt);
  const time = `${(elapsed / 1000).toFixed(1)} s`;
  const {position, waiting} = pool.latest?.queue ?? {};
  const queue = position ? ` · ${position} of ${waiting} in the queue` : "";
  if (run.startedAt === null) showState("waiting", `Waiting for a machine… ${time}${queue}`);
  else showState("running", `Running… ${time}`);
}

function finished(run, exit) {
  const good = exit.code === 0 && !exit.reason;
  const result = resultText(exit, good, exit.wall_ms);
  const signal = exit.signal ? ` (${exit.signal})` : "";
  showResult(run, good ? "good" : "bad", `${result} · exit code ${exit.code}${signal}`);
  run.details = {
    "Exit code": String(exit.code),
    "Signal": exit.signal,
    "Reason": exit.reason,
    "Waited": null, // later, see showTimes
    "Ran": null,
    "CPU time": exit.cpu_ms === undefined ? null : duration(exit.cpu_ms),
    "Memory": exit.max_rss_kb === undefined ? null : size(1024 * exit.max_rss_kb),
    "Truncated": exit.truncated ? `yes, the output limit dropped ${size(exit.dropped_bytes ?? 0)}` : null,
    ...run.details,
  };
  showDetails(run);
  const missing = missingFiles(exit);
  if (missing) showProblem(`Not returned: ${missing}`);
  const {stdout, stderr} = terminal.lines;
  announce(`${result}. Exit code ${exit.code}${signal}. ${stdout + stderr} lines of output, ${stderr} on standard error.` +
    (downloads.count ? ` Files to download: ${downloads.count}.` : "") + (missing ? ` Not returned: ${missing}.` : ""));
}

/** The requested files that have not arrived, and why; empty if there are none. */
function missingFiles({output_errors = [], output_errors_dropped: more}) {
  return [
    downloads.incomplete !== null && `${downloads.incomplete} (the run ended before)`,
    ...output_errors.map(({name, error}) => `${name} (${PROBLEMS[error] ?? error})`),
    more && `${more} more`,
  ].filter(Boolean).join(", ");
}

function resultText(exit, good, ran) {
  if (exit.reason === "timeout") return `Timed out after ${limitText(pool.latest?.max_req_time_ms ?? ran)}`;
  if (exit.reason) return REASONS[exit.reason] ?? exit.reason;
  if (exit.oom) return "Out of memory";
  if (exit.signal) return "Killed";
  return good ? "Done" : "Failed";
}

function cancelled(run) {
  showResult(run, "cancelled", `Cancelled after ${duration(performance.now() - run.sentAt)}`);
  if (run.startedAt !== null) showDetails(run);
  announce(run.startedAt === null ? "Cancelled." : "Cancelled. The script was stopped.");
}

function failed(run, error) {
  if (!(error instanceof RunError || error instanceof FieldError)) console.error(error);
  showResult(run, "bad", run.startedAt === null ? "Not run" : "Interrupted");
  const retry = error.retryAfter === undefined || error.retryAfter === null ? "" : ` Try again in ${error.retryAfter} s.`;
  showProblem(sentence(error.message) + retry);
  if (run.startedAt !== null) showDetails(run);
  announce(byId("problem").textContent);
}

// Display

function showState(name, text) {
  byId("state").dataset.state = name;
  byId("state").textContent = text;
}

function showResult(run, state, text) {
  run.result = text;
  showState(state, text);
}

function showDetails(run) {
  const details = Object.entries(run.details).filter(([, value]) => value);
  byId("details").replaceChildren(...details.map(([term, value]) => descriptionItem(term, value)));
  byId("details").hidden = false;
}

function showProblem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = false;
}

function showDropped({droppedRows, droppedCharacters}) {
  byId("dropped").hidden = droppedRows === 0;
  byId("dropped").textContent =
    `Only the latest output is shown; ${droppedRows.toLocaleString("en")} earlier lines ` +
    `(${size(droppedCharacters)}) are not.`;
}

/** Announces text to screen readers, even if it is the same as before. */
function announce(text) {
  byId("announcement").textContent = "";
  setTimeout(() => (byId("announcement").textContent = text), 50);
}

function switchButtons(running) {
  const focused = document.activeElement;
  byId("run").disabled = running;
  byId("cancel").disabled = !running;
  if (focused === byId(running ? "run" : "cancel")) byId(running ? "cancel" : "run").focus();
}

const sentence = (text) => (/[.?!]$/.test(text) ? text : `${text}.`);

// The form, links and the curl command

/** Fills the form with a request. */
function edit({script, ...values}) {
  editor.text = script;
  fields.values = values;
  byId("examples").value = "";
  byId("from-link").hidden = true;
  byId("script").focus();
}

/** The form was changed, by the user or the page. */
function changed() {
  store("draft", {script: editor.text, ...fields.values});
  byId("command").textContent = commandText();
}

function commandText() {
  const address = new URL("run", location.href);
  const options = hasToken() ? '-sN -H "Authorization: Bearer $BFAAS_TOKEN"' : "-sN";
  return curlCommand(options, address.origin + address.pathname, editor.text, fields.values, fields.files);
}

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
  const notice = byId("from-link");
  try {
    editor.text = decode(location.hash.slice("#script=".length));
    changed();
    notice.textContent = "This script came with the link you opened. Read it before you run it.";
  } catch {
    notice.textContent = "The link you opened is damaged: its script cannot be decoded.";
  }
  notice.hidden = false;
}

async function copy(button, text) {
  const label = button.dataset.label ?? (button.dataset.label = button.textContent);
  const copied = await toClipboard(text);
  button.textContent = copied ? "Copied" : "Not copied";
  announce(copied ? "Copied." : "The browser did not allow copying.");
  clearTimeout(button.labelTimer);
  button.labelTimer = setTimeout(() => (button.textContent = label), 1500);
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages from other hosts without TLS have no clipboard API; the deprecated command still works.
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

// Event handlers

for (const name of Object.keys(EXAMPLES)) byId("examples").append(new Option(name, name));
byId("examples").addEventListener("change", ({target}) => {
  if (!target.value) return;
  editor.text = EXAMPLES[target.value];
  byId("from-link").hidden = true;
  changed();
});
byId("script").addEventListener("input", () => {
  byId("examples").value = "";
  changed();
});
byId("run").addEventListener("click", start);
byId("cancel").addEventListener("click", () => current?.abort.abort());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  start();
});
byId("link").addEventListener("click", ({currentTarget}) => {
  history.replaceState(null, "", `#script=${encode(editor.text)}`);
  copy(currentTarget, location.href);
});
byId("curl").addEventListener("click", ({currentTarget}) => copy(currentTarget, commandText()));
window.addEventListener("hashchange", readLink);

listen(() => {
  changed();
  pool.refresh();
});

const draft = load("draft");
if (typeof draft?.script === "string") edit(draft);
else editor.text = EXAMPLES.Hello;
document.activeElement?.blur();
readLink();
changed();
pool.start();
