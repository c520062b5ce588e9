// The fields of a request: reads them, builds the body that is sent, and the curl command for it.

import {byId, element} from "./dom.js";

const TEXT_FIELDS = ["stdin", "env", "timeout", "outputs"];

/** A field cannot be sent as it is. The message is for users. */
export class FieldError extends Error {}

/** The optional fields of the form, below the script. `onChange()` is called after each change. */
export class RequestFields {
  #files = new Map(); // by name
  #onChange;

  constructor(onChange) {
    this.#onChange = onChange;
    for (const name of TEXT_FIELDS) byId(name).addEventListener("input", () => this.#changed());
    byId("files").addEventListener("change", ({target}) => {
      this.#add(target.files);
      target.value = ""; // so that the same file can be chosen again
    });
    this.#acceptDrops();
  }

  /** The values of the text fields, by name. */
  get values() {
    return Object.fromEntries(TEXT_FIELDS.map((name) => [name, byId(name).value]));
  }

  /** Sets text fields; others are emptied. Files stay. */
  set values(values) {
    for (const name of TEXT_FIELDS) byId(name).value = values[name] ?? "";
    this.#changed();
    if (this.#summary) byId("options").open = true;
  }

  get files() {
    return [...this.#files.values()];
  }

  #add(files) {
    for (const file of files) this.#files.set(file.name, file);
    byId("options").open = true;
    this.#drawFiles();
  }

  #drawFiles() {
    byId("file-list").replaceChildren(...this.files.map((file) => {
      const item = element("li", file.name);
      const remove = element("button", "Remove", "quiet");
      remove.type = "button";
      remove.setAttribute("aria-label", `Remove ${file.name}`);
      remove.addEventListener("click", () => {
        this.#files.delete(file.name);
        this.#drawFiles();
        byId("files").focus();
      });
      item.append(" ", element("small", size(file.size)), remove);
      return item;
    }));
    this.#changed();
  }

  /** Accepts files that are dropped anywhere: outside of a zone, the browser would leave the page to show them. */
  #acceptDrops() {
    const zone = document.documentElement;
    const on = (name, handle) => zone.addEventListener(name, (event) => {
      if (event.dataTransfer?.types.includes("Files")) handle(event);
    });
    const show = (event) => {
      event.preventDefault();
      zone.classList.add("drop");
    };
    on("dragenter", show);
    on("dragover", show);
    on("dragleave", (event) => {
      if (!zone.contains(event.relatedTarget)) zone.classList.remove("drop");
    });
    on("drop", (event) => {
      event.preventDefault();
      zone.classList.remove("drop");
      this.#add(event.dataTransfer.files);
    });
  }

  get #summary() {
    const {stdin, env, timeout, outputs} = this.values;
    const variables = lines(env).length;
    return [
      stdin && "input",
      variables && counted(variables, "variable"),
      timeout.trim() && `at most ${timeout.trim()}`,
      this.#files.size && counted(this.#files.size, "file"),
      outputs.trim() && "files to fetch",
    ].filter(Boolean).join(", ");
  }

  #changed() {
    byId("options-summary").textContent = this.#summary && `(${this.#summary})`;
    this.#onChange();
  }
}

/** Returns the body and the headers of a request: with files a form. Throws a FieldError. */
export async function requestBody(script, values, files) {
  const request = jsonRequest(script, values);
  if (files.length) return {body: await form(request, files), headers: {}}; // the browser sets its type
  if (Object.keys(request).length === 1) return {body: script, headers: {}};
  return {body: JSON.stringify(request), headers: {"Content-Type": "application/json"}};
}

async function form(request, files) {
  const body = new FormData();
  for (const [name, value] of parts(request))
    // As a file, since the line ends of other values become CRLF.
    body.append(name, name === "stdin" ? new Blob([value]) : value);
  for (const file of files) {
    await checkReadable(file);
    body.append("file", file);
  }
  return body;
}

/** Throws a FieldError if a file cannot be read: the error of fetch would be that of a lost connection. */
async function checkReadable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new FieldError(`${file.name} cannot be read. Is it a folder, or was it changed or removed after you added it?`);
  }
}

/** The parts of a form, except files, as pairs of name and value. */
const parts = ({env = {}, outputs = [], ...others}) => [
  ...Object.entries(others),
  ...Object.entries(env).map(([name, value]) => ["env", `${name}=${value}`]),
  ...outputs.map((pattern) => ["outputs", pattern]),
];

/** The curl command for a request, quoted for a shell. `options` are curl's. */
export function curlCommand(options, url, script, values, files) {
  let request;
  try {
    request = jsonRequest(script, values);
  } catch (error) {
    if (error instanceof FieldError) return `# ${error.message}`;
    throw error;
  }
  if (!files.length) {
    const isPlain = Object.keys(request).length === 1;
    const body = isPlain ? script : JSON.stringify(request);
    const type = isPlain ? "" : " -H 'Content-Type: application/json'";
    return `curl ${options} ${quoted(url)}${type} --data-raw ${quoted(body)}`;
  }
  // --form-string, since a value of -F that begins with @ or < names a file.
  return [
    `curl ${options} ${quoted(url)}`,
    ...parts(request).map(([name, value]) => `--form-string ${quoted(`${name}=${value}`)}`),
    ...files.map((file) => `-F ${quoted(`file=@"${file.name.replaceAll(/[\\"]/g, "\\$&")}"`)}`),
  ].join(" ");
}

function jsonRequest(script, {stdin, env, timeout, outputs}) {
  const request = {script};
  if (stdin) request.stdin = stdin;
  if (lines(env).length) request.env = Object.fromEntries(lines(env).map(variable));
  if (timeout?.trim()) request.timeout = timeout.trim();
  if (outputs?.trim()) request.outputs = outputs.trim().split(/\s+/);
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
