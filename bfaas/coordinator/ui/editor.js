// The editor of the script: line numbers, and Tab that indents. Independent of the rest of the page.

const INDENT = "  ";

/**
 * Turns a textarea into an editor, with its line numbers in another element.
 *
 * Tab indents and Shift-Tab the opposite. After Escape, Tab moves the focus, until another key is pressed: the
 * keyboard must not be trapped (WCAG 2.1, 2.1.2).
 */
export class Editor {
  #field;
  #numbers;
  #count = 0;
  #leaving = false;

  constructor(field, numbers) {
    this.#field = field;
    this.#numbers = numbers;
    field.addEventListener("input", () => this.#draw());
    field.addEventListener("scroll", () => this.#scroll());
    field.addEventListener("keydown", (event) => this.#onKey(event));
    field.addEventListener("blur", () => (this.#leaving = false));
    this.#draw();
  }

  get text() {
    return this.#field.value;
  }

  /** Sets the text. It cannot be undone by the user. */
  set text(text) {
    this.#field.value = text;
    this.#draw();
  }

  #draw() {
    const count = this.#field.value.split("\n").length;
    if (count !== this.#count) {
      this.#numbers.textContent = Array.from({length: count}, (_, index) => index + 1).join("\n");
      this.#count = count;
    }
    this.#scroll();
  }

  #scroll() {
    this.#numbers.scrollTop = this.#field.scrollTop;
  }

  #onKey(event) {
    const isPlain = !(event.ctrlKey || event.metaKey || event.altKey);
    if (event.key === "Escape") this.#leaving = true;
    else if (event.key !== "Tab" && event.key !== "Shift") this.#leaving = false;
    else if (event.key === "Tab" && isPlain && !this.#leaving) {
      event.preventDefault();
      if (event.shiftKey) this.#changeLines((line) => line.replace(/^(\t| {1,2})/, ""));
      else if (this.#selected.includes("\n")) this.#changeLines((line) => (line ? INDENT + line : line));
      else insert(INDENT);
    }
  }

  get #selected() {
    const {value, selectionStart, selectionEnd} = this.#field;
    return value.slice(selectionStart, selectionEnd);
  }

  /** Changes the lines that the selection touches. The selection stays on the same text. */
  #changeLines(change) {
    const field = this.#field;
    const {value, selectionStart: from, selectionEnd: to} = field;
    const start = value.lastIndexOf("\n", from - 1) + 1;
    // A selection that ends at the beginning of a line does not include that line.
    const last = to > from && value[to - 1] === "\n" ? to - 1 : to;
    const end = value.indexOf("\n", last) === -1 ? value.length : value.indexOf("\n", last);
    const before = value.slice(start, end).split("\n");
    const after = before.map(change);
    const text = after.join("\n");
    if (text === value.slice(start, end)) return;
    field.setSelectionRange(start, end);
    insert(text);
    const first = after[0].length - before[0].length;
    field.setSelectionRange(Math.max(start, from + first), Math.max(start, to + text.length - (end - start)));
  }
}

/** Replaces the selection of the focused field, such that the user can undo it: only this deprecated command can. */
function insert(text) {
  document.execCommand(text ? "insertText" : "delete", false, text);
}
