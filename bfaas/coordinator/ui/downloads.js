// Files that a run has returned, as links that save them.

import {element} from "./dom.js";
import {size} from "./request.js";

/** Collects the pieces of files, which follow each other, and shows each file when it is complete. */
export class Downloads {
  #list;
  #pieces = [];
  #left = 0; // bytes of the current file
  #name = null;

  constructor(list) {
    this.#list = list;
  }

  /** The number of complete files. */
  get count() {
    return this.#list.children.length;
  }

  /** The name of the file whose rest has not arrived; null if there is none. */
  get incomplete() {
    return this.#name;
  }

  /** Removes all files. */
  clear() {
    this.#name = null;
    for (const link of this.#list.querySelectorAll("a")) URL.revokeObjectURL(link.href);
    this.#list.replaceChildren();
    this.#list.hidden = true;
  }

  /** Adds a piece of a file, as a `file` event has it. */
  add({name, size: total, base64}) {
    if (this.#name === null) [this.#name, this.#left, this.#pieces] = [name, total, []];
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    this.#pieces.push(bytes);
    this.#left -= bytes.length;
    if (this.#left > 0) return;
    // Without a type, browsers add an extension to names that have none.
    this.#show(name, new Blob(this.#pieces, {type: "application/octet-stream"}));
    this.#name = null;
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
