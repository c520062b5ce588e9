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
    this.#acceptDrops(byId("form"));
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

  #acceptDrops(zone) {
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    for (const name of ["dragenter", "dragover"])
      zone.addEventListener(name, (event) => {
        if (!hasFiles(event)) return;
        event.preventDefault();
        zone.classList.add("drop");
      });
    for (const name of ["dragleave", "drop"])
      zone.addEventListener(name, (event) => {
        if (name === "dragleave" && zone.contains(event.relatedTarget)) return;
        zone.classList.remove("drop");
      });
    zone.addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
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

/** Returns the body and the headers of a request. Throws a FieldError. */
export async function requestBody(script, values, files) {
  const request = jsonRequest(script, values);
  if (files.length) request.files = Object.fromEntries(await Promise.all(files.map(encodeFile)));
  if (Object.keys(request).length === 1) return {body: script, headers: {}};
  return {body: JSON.stringify(request), headers: {"Content-Type": "application/json"}};
}

/** The curl command for a request, quoted for a shell. */
export function curlCommand(url, script, values, files) {
  let request;
  try {
    request = jsonRequest(script, values);
  } catch (error) {
    if (error instanceof FieldError) return `# ${error.message}`;
    throw error;
  }
  const {env = {}, outputs = [], ...others} = request;
  if (!files.length) {
    const isPlain = Object.keys(request).length === 1;
    const body = isPlain ? script : JSON.stringify(request);
    const type = isPlain ? "" : " -H 'Content-Type: application/json'";
    return `curl -sN ${quoted(url)}${type} --data-raw ${quoted(body)}`;
  }
  // --form-string, since a value of -F that begins with @ or < names a file.
  const fields = [
    ...Object.entries(others),
    ...Object.entries(env).map(([name, value]) => ["env", `${name}=${value}`]),
    ...outputs.map((pattern) => ["outputs", pattern]),
  ];
  return [
    `curl -sN ${quoted(url)}`,
    ...fields.map(([name, value]) => `--form-string ${quoted(`${name}=${value}`)}`),
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

async function encodeFile(file) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new FieldError(`The file ${file.name} cannot be read: ${reader.error.message}`));
    reader.readAsDataURL(file);
  });
  return [file.name, {base64: url.slice(url.indexOf(",") + 1)}];
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
