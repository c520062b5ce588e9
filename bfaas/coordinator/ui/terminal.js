// Text of two streams, with the escapes that terminals know, shown as rows of text. Nothing becomes markup.

const MAX_ROWS = 5000;
const MAX_CHARACTERS = 2_000_000;
const MAX_ROW = 8192; // characters, then the row is broken
const MAX_ESCAPE = 4096; // characters that an escape may have; then it was none

const PLAIN = Object.freeze({});

/** Shows the latest rows in an element, and counts what it no longer shows. */
export class Terminal {
  #element;
  #changed;
  #scheduled = false;

  /** `changed(terminal)` is called after each drawing. */
  constructor(element, changed) {
    this.#element = element;
    this.#changed = changed;
    this.clear();
  }

  clear() {
    this.rows = [];
    this.characters = 0;
    this.droppedRows = 0;
    this.droppedCharacters = 0;
    this.lines = {stdout: 0, stderr: 0};
    this.streams = {stdout: new Stream(), stderr: new Stream()};
    this.column = 0;
    this.row = null;
    this.cost = 0;
    this.#element.replaceChildren();
    this.#draw();
  }

  write(name, text) {
    for (const part of this.streams[name].read(text)) this.#take(name, part);
    this.#schedule();
  }

  #take(name, {text, control, style}) {
    if (text !== undefined) {
      for (let start = 0; start < text.length; ) {
        const row = this.#current();
        const piece = text.slice(start, start + MAX_ROW - this.column);
        this.characters += row.put(this.column, piece, style, name);
        this.column += piece.length;
        start += piece.length;
        if (this.column >= MAX_ROW) this.#end();
      }
    } else if (control === "\n") {
      this.#current();
      this.lines[name] += 1;
      this.#end();
    } else if (control === "\r") this.column = 0;
    else if (control === "\b") this.column = Math.max(0, this.column - 1);
    else if (control === "erase") this.characters += this.#current().erase(this.column);
    else if (control === "erase all") this.characters += this.#current().erase(0, this.column);
  }

  #current() {
    if (this.row === null) {
      this.row = new Row();
      this.rows.push(this.row);
    }
    return this.row;
  }

  #end() {
    this.row = null;
    this.column = 0;
    // In steps: taking single rows from the front of a long list is slow.
    if (this.rows.length > 1.2 * MAX_ROWS || this.characters > 1.2 * MAX_CHARACTERS) this.#forget();
  }

  #forget() {
    let rows = 0;
    let characters = 0;
    const enough = () =>
      this.rows.length - rows <= MAX_ROWS && this.characters - characters <= MAX_CHARACTERS;
    while (!enough()) {
      characters += this.rows[rows].length;
      this.rows[rows].element?.remove();
      rows += 1;
    }
    this.rows.splice(0, rows);
    this.characters -= characters;
    this.droppedRows += rows;
    this.droppedCharacters += characters + rows;
  }

  #schedule() {
    if (this.#scheduled) return;
    this.#scheduled = true;
    // Drawing has at most a third of the time.
    setTimeout(() => requestAnimationFrame(() => this.#draw()), 2 * this.cost);
  }

  #draw() {
    this.#scheduled = false;
    const began = performance.now();
    const box = this.#element;
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
    const fresh = document.createDocumentFragment();
    for (const row of this.#undrawn()) {
      const known = row.element !== null;
      row.draw();
      if (!known) fresh.append(row.element);
    }
    box.append(fresh);
    if (atEnd) box.scrollTop = box.scrollHeight;
    this.cost = Math.min(300, performance.now() - began);
    this.#changed(this);
  }

  #undrawn() {
    let first = this.rows.length;
    while (first > 0 && this.rows[first - 1].dirty) first -= 1;
    return this.rows.slice(first);
  }
}

/** One row: pieces of text, each of a style and a stream. Writing over what is there replaces it. */
class Row {
  element = null;
  dirty = true;
  length = 0;
  #pieces = [];

  /** Writes text at a column; tells by how many characters the row has grown. */
  put(column, text, style, stream) {
    const piece = {text, style, stream};
    const before = this.length;
    if (column === before) {
      const last = this.#pieces.at(-1);
      if (last && last.style === style && last.stream === stream) last.text += text;
      else this.#pieces.push(piece);
    } else {
      this.#pieces = [...this.#cut(0, column), piece, ...this.#cut(column + text.length, Infinity)];
    }
    this.length = Math.max(before, column + text.length);
    this.dirty = true;
    return this.length - before;
  }

  /** Erases from a column to the end, and puts `room` blanks there; tells by how much the row has grown. */
  erase(column, room = 0) {
    this.#pieces = this.#cut(0, column);
    if (room) this.#pieces.push({text: " ".repeat(room), style: PLAIN, stream: "stdout"});
    const before = this.length;
    this.length = column + room;
    this.dirty = true;
    return this.length - before;
  }

  #cut(from, to) {
    const kept = [];
    let at = 0;
    for (const {text, style, stream} of this.#pieces) {
      const part = text.slice(Math.max(0, from - at), Math.max(0, to - at));
      if (part) kept.push({text: part, style, stream});
      at += text.length;
    }
    return kept;
  }

  draw() {
    this.dirty = false;
    this.element ??= document.createElement("div");
    const streams = new Set(this.#pieces.map((piece) => piece.stream));
    this.element.className = streams.has("stderr") ? (streams.size > 1 ? "row err mixed" : "row err") : "row";
    this.element.replaceChildren(...this.#pieces.map(span));
    if (!this.length) this.element.append("\n");
  }
}

function span({text, style, stream}) {
  if (style === PLAIN && stream === "stdout") return document.createTextNode(text);
  const element = document.createElement("span");
  element.textContent = text;
  const classes = stream === "stderr" ? ["stderr"] : [];
  for (const name of ["bold", "faint", "italic", "underline", "strike"]) if (style[name]) classes.push(name);
  const [front, back] = style.inverse ? [style.back ?? "ground", style.front ?? "text"] : [style.front, style.back];
  if (front?.startsWith("#")) element.style.color = front;
  else if (front) classes.push(`front-${front}`);
  if (back?.startsWith("#")) element.style.backgroundColor = back;
  else if (back) classes.push(`back-${back}`);
  element.className = classes.join(" ");
  return element;
}

// Where reading of a stream is.
const TEXT = 0;
const ESCAPE = 1; // after ESC
const SEQUENCE = 2; // after ESC [
const STRING = 3; // after ESC ] and its like, up to BEL or ESC \
const CHARSET = 4; // after ESC ( and its like: one more

const SPECIAL = /[\x00-\x08\x0a-\x1f\x7f-\x9f]/g;

/** Reads one stream: text with its style, and the few controls that are kept. An escape may come in pieces. */
class Stream {
  #where = TEXT;
  #escape = "";
  #style = PLAIN;

  *read(text) {
    let at = 0;
    while (at < text.length) {
      if (this.#where === TEXT) {
        SPECIAL.lastIndex = at;
        const end = SPECIAL.exec(text)?.index ?? text.length;
        if (end > at) yield {text: text.slice(at, end), style: this.#style};
        if (end < text.length) {
          const control = text[end];
          if (control === "\x1b") this.#where = ESCAPE;
          else if (control === "\n" || control === "\r" || control === "\b") yield {control};
        }
        at = end + 1;
      } else {
        const erases = this.#step(text[at]);
        if (erases) yield {control: erases};
        at += 1;
      }
    }
  }

  #step(character) {
    if (this.#where === ESCAPE) {
      this.#escape = "";
      if (character === "[") this.#where = SEQUENCE;
      else if ("]PX^_".includes(character)) this.#where = STRING;
      else if (character >= " " && character <= "/") this.#where = CHARSET;
      else if (character !== "\x1b") this.#where = TEXT;
    } else if (this.#where === CHARSET) {
      if (character < " " || character > "/") this.#where = TEXT;
    } else if (character === "\x1b") this.#where = ESCAPE; // of a string, mostly its end
    else if (this.#where === STRING) {
      this.#escape += character;
      if (character === "\x07" || this.#escape.length > MAX_ESCAPE) this.#where = TEXT;
    } else if (character >= "@" && character <= "~") {
      this.#where = TEXT;
      if (character === "m") this.#style = styled(this.#style, this.#escape);
      if (character === "K") return this.#escape === "2" ? "erase all" : this.#escape === "1" ? null : "erase";
    } else {
      this.#escape += character;
      if (this.#escape.length > MAX_ESCAPE) this.#where = TEXT;
    }
    return null;
  }
}

const SWITCHES = {
  1: {bold: true}, 2: {faint: true}, 3: {italic: true}, 4: {underline: true}, 7: {inverse: true}, 9: {strike: true},
  22: {bold: false, faint: false}, 23: {italic: false}, 24: {underline: false}, 27: {inverse: false},
  29: {strike: false}, 39: {front: undefined}, 49: {back: undefined},
};

/** The style that follows on a style by the parameters of an SGR sequence. */
function styled(style, parameters) {
  if (!/^[\d;:]*$/.test(parameters)) return style;
  // The newer spelling, with colons, may name a colour space, or a kind of underline.
  const usual = parameters.replace(/([34]8:2):\d*(?=(:\d+){3}(;|$))/g, "$1").replace(/(^|;)4:[1-9]/g, "$14");
  const codes = usual.split(/[;:]/).map(Number);
  let next = {...style};
  for (let at = 0; at < codes.length; at += 1) {
    const code = codes[at];
    if (code === 0) next = {};
    else if (code === 38 || code === 48 || code === 58) {
      const wide = codes[at + 1] === 2;
      const color = wide ? rgb(codes.slice(at + 2, at + 5)) : indexed(codes[at + 2]);
      at += wide ? 4 : 2;
      if (code === 38) next.front = color;
      if (code === 48) next.back = color; // 58 is an underline's
    } else if (code >= 30 && code <= 37) next.front = String(code - 30);
    else if (code >= 90 && code <= 97) next.front = String(code - 82);
    else if (code >= 40 && code <= 47) next.back = String(code - 40);
    else if (code >= 100 && code <= 107) next.back = String(code - 92);
    else Object.assign(next, SWITCHES[code]);
  }
  return Object.values(next).some(Boolean) ? next : PLAIN;
}

function indexed(code) {
  if (!(code >= 0 && code <= 255)) return undefined;
  if (code < 16) return String(code);
  if (code >= 232) return rgb(Array(3).fill(8 + 10 * (code - 232)));
  const cube = code - 16;
  return rgb([Math.floor(cube / 36), Math.floor(cube / 6) % 6, cube % 6].map((step) => step && 55 + 40 * step));
}

function rgb(parts) {
  const sound = parts.length === 3 && parts.every((part) => part >= 0 && part <= 255);
  return sound ? `#${parts.map((part) => part.toString(16).padStart(2, "0")).join("")}` : undefined;
}
