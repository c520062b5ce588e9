// Files that a run has returned, as links that save them.

import {element} from "./dom.js";
import {size} from "./request.js";

/** Collects pieces of files, and shows each file when it is complete. */
export class Downloads {
  #list;
  #pieces = new Map(); // of incomplete files, by name

  constructor(list) {
    this.#list = list;
  }

  /** Removes all files. */
  clear() {
    this.#pieces.clear();
    for (const link of this.#list.querySelectorAll("a")) URL.revokeObjectURL(link.href);
    this.#list.replaceChildren();
    this.#list.hidden = true;
  }

  /** Adds a piece of a file, as a `file` event has it. */
  add({name, size: total, base64}) {
    const pieces = this.#pieces.get(name) ?? {bytes: [], length: 0};
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    pieces.bytes.push(bytes);
    pieces.length += bytes.length;
    this.#pieces.set(name, pieces);
    if (pieces.length < total) return;
    this.#pieces.delete(name);
    this.#show(name, new Blob(pieces.bytes));
  }

  #show(name, blob) {
    const link = element("a", name);
    link.href = URL.createObjectURL(blob);
    link.download = name.replaceAll("/", "_");
    const item = element("li", "");
    item.append(link, " ", element("small", size(blob.size)));
    this.#list.append(item);
    this.#list.hidden = false;
  }
}
