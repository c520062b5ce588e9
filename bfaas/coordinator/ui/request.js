// The fields of a request: reads them, builds the body that is sent, and the curl command for it.

import {byId} from "./dom.js";

const TEXT_FIELDS = ["stdin", "env", "timeout"];

/** A field cannot be sent as it is. The message is for users. */
export class FieldError extends Error {}

/** The optional fields of the form, below the script. `onChange()` is called after each change. */
export class RequestFields {
  #onChange;

  constructor(onChange) {
    this.#onChange = onChange;
    for (const name of TEXT_FIELDS) byId(name).addEventListener("input", () => this.#changed());
  }

  /** The values of the text fields, by name. */
  get values() {
    return Object.fromEntries(TEXT_FIELDS.map((name) => [name, byId(name).value]));
  }

  /** Sets text fields; others are emptied. */
  set values(values) {
    for (const name of TEXT_FIELDS) byId(name).value = values[name] ?? "";
    this.#changed();
    if (this.#summary) byId("options").open = true;
  }

  get #summary() {
    const {stdin, env, timeout} = this.values;
    const variables = lines(env).length;
    return [
      stdin && "input",
      variables && counted(variables, "variable"),
      timeout.trim() && `at most ${timeout.trim()}`,
    ].filter(Boolean).join(", ");
  }

  #changed() {
    byId("options-summary").textContent = this.#summary && `(${this.#summary})`;
    this.#onChange();
  }
}

/** Returns the body and the headers of a request. Throws a FieldError. */
export function requestBody(script, values) {
  const request = jsonRequest(script, values);
  if (Object.keys(request).length === 1) return {body: script, headers: {}};
  return {body: JSON.stringify(request), headers: {"Content-Type": "application/json"}};
}

/** The curl command for a request, quoted for a shell. */
export function curlCommand(url, script, values) {
  let request;
  try {
    request = jsonRequest(script, values);
  } catch (error) {
    if (error instanceof FieldError) return `# ${error.message}`;
    throw error;
  }
  const isPlain = Object.keys(request).length === 1;
  const body = isPlain ? script : JSON.stringify(request);
  const type = isPlain ? "" : " -H 'Content-Type: application/json'";
  return `curl -sN ${quoted(url)}${type} --data-raw ${quoted(body)}`;
}

function jsonRequest(script, {stdin, env, timeout}) {
  const request = {script};
  if (stdin) request.stdin = stdin;
  if (lines(env).length) request.env = Object.fromEntries(lines(env).map(variable));
  if (timeout?.trim()) request.timeout = timeout.trim();
  return request;
}

const lines = (text) => (text ?? "").split("\n").filter((line) => line.trim());

function variable(line) {
  const at = line.indexOf("=");
  if (at < 1) throw new FieldError(`Variables are written NAME=value, one per line, not “${line}”.`);
  return [line.slice(0, at).trim(), line.slice(at + 1)];
}

/** Quotes text for a shell: each single quote becomes '\''. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** Formats a number of bytes. */
export function size(bytes) {
  if (bytes < 1000) return `${bytes} bytes`;
  if (bytes < 999_500) return `${(bytes / 1e3).toPrecision(3)} kB`;
  return `${(bytes / 1e6).toPrecision(3)} MB`;
}
