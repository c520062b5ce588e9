// Shows the text of two streams as rows, and interprets terminal escapes. Nothing becomes markup.

const MAX_ROWS = 5000;
const MAX_CHARACTERS = 2_000_000;
const MAX_ROW = 8192; // characters; a longer row is wrapped
const MAX_ESCAPE = 4096; // characters; a longer escape is dropped, and the rest is text

const PLAIN = Object.freeze({});

/** Shows the latest rows in an element, and counts those it no longer shows. */
export class Terminal {
  #element;
  #onDraw;
  #scheduled = false;

  /** `onDraw(terminal)` is called each time the terminal is drawn. */
  constructor(element, onDraw) {
    this.#element = element;
    this.#onDraw = onDraw;
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
    this.drawTime = 0;
    this.#element.replaceChildren();
    this.#draw();
  }

  write(name, text) {
    for (const part of this.streams[name].parse(text)) this.#apply(name, part);
    this.#schedule();
  }

  #apply(name, {text, control, style}) {
    if (text !== undefined) {
      for (let start = 0; start < text.length; ) {
        const row = this.#currentRow();
        const piece = text.slice(start, start + MAX_ROW - this.column);
        this.characters += row.put(this.column, piece, style, name);
        this.column += piece.length;
        start += piece.length;
        if (this.column >= MAX_ROW) this.#endRow();
      }
    } else if (control === "\n") {
      this.#currentRow();
      this.lines[name] += 1;
      this.#endRow();
    } else if (control === "\r") this.column = 0;
    else if (control === "\b") this.column = Math.max(0, this.column - 1);
    else if (control === "erase") this.characters += this.#currentRow().erase(this.column);
    else if (control === "erase all") this.characters += this.#currentRow().erase(0, this.column);
  }

  #currentRow() {
    if (this.row === null) {
      this.row = new Row();
      this.rows.push(this.row);
    }
    return this.row;
  }

  #endRow() {
    this.row = null;
    this.column = 0;
    // In batches: removing single rows from the front of a long list is slow.
    if (this.rows.length > 1.2 * MAX_ROWS || this.characters > 1.2 * MAX_CHARACTERS) this.#dropRows();
  }

  #dropRows() {
    let rows = 0;
    let characters = 0;
    const isWithinLimits = () =>
      this.rows.length - rows <= MAX_ROWS && this.characters - characters <= MAX_CHARACTERS;
    while (!isWithinLimits()) {
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
    // Drawing takes at most a third of the time.
    setTimeout(() => requestAnimationFrame(() => this.#draw()), 2 * this.drawTime);
  }

  #draw() {
    this.#scheduled = false;
    const startedAt = performance.now();
    const box = this.#element;
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
    const added = document.createDocumentFragment();
    for (const row of this.#undrawn()) {
      const isNew = row.element === null;
      row.draw();
      if (isNew) added.append(row.element);
    }
    box.append(added);
    if (atEnd) box.scrollTop = box.scrollHeight;
    this.drawTime = Math.min(300, performance.now() - startedAt);
    this.#onDraw(this);
  }

  #undrawn() {
    let first = this.rows.length;
    while (first > 0 && this.rows[first - 1].dirty) first -= 1;
    return this.rows.slice(first);
  }
}

/** One row: pieces of text, each with a style and a stream. Text can be overwritten. */
class Row {
  element = null;
  dirty = true;
  length = 0;
  #pieces = [];

  /** Writes text at a column. Returns by how many characters the row has grown. */
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

  /** Replaces everything from a column on by blanks. Returns by how many characters the row has grown. */
  erase(column, blanks = 0) {
    this.#pieces = this.#cut(0, column);
    if (blanks) this.#pieces.push({text: " ".repeat(blanks), style: PLAIN, stream: "stdout"});
    const before = this.length;
    this.length = column + blanks;
    this.dirty = true;
    return this.length - before;
  }

  #cut(from, to) {
    const pieces = [];
    let start = 0;
    for (const {text, style, stream} of this.#pieces) {
      const part = text.slice(Math.max(0, from - start), Math.max(0, to - start));
      if (part) pieces.push({text: part, style, stream});
      start += text.length;
    }
    return pieces;
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

// States of the parser.
const TEXT = 0;
const ESCAPE = 1; // after ESC
const SEQUENCE = 2; // after ESC [
const STRING = 3; // after ESC ] and similar, up to BEL or ESC \
const CHARSET = 4; // after ESC ( and similar: one more character

const SPECIAL = /[\x00-\x08\x0a-\x1f\x7f-\x9f]/g;

/** Parses one stream into text with a style, and the supported controls. An escape may be split over pieces. */
class Stream {
  #state = TEXT;
  #escape = "";
  #style = PLAIN;

  *parse(text) {
    let index = 0;
    while (index < text.length) {
      if (this.#state === TEXT) {
        SPECIAL.lastIndex = index;
        const end = SPECIAL.exec(text)?.index ?? text.length;
        if (end > index) yield {text: text.slice(index, end), style: this.#style};
        if (end < text.length) {
          const control = text[end];
          if (control === "\x1b") this.#state = ESCAPE;
          else if (control === "\n" || control === "\r" || control === "\b") yield {control};
        }
        index = end + 1;
      } else {
        const control = this.#step(text[index]);
        if (control) yield {control};
        index += 1;
      }
    }
  }

  #step(character) {
    if (this.#state === ESCAPE) {
      this.#escape = "";
      if (character === "[") this.#state = SEQUENCE;
      else if ("]PX^_".includes(character)) this.#state = STRING;
      else if (character >= " " && character <= "/") this.#state = CHARSET;
      else if (character !== "\x1b") this.#state = TEXT;
    } else if (this.#state === CHARSET) {
      if (character < " " || character > "/") this.#state = TEXT;
    } else if (character === "\x1b") this.#state = ESCAPE; // usually the end of a string
    else if (this.#state === STRING) {
      this.#escape += character;
      if (character === "\x07" || this.#escape.length > MAX_ESCAPE) this.#state = TEXT;
    } else if (character >= "@" && character <= "~") {
      this.#state = TEXT;
      if (character === "m") this.#style = styled(this.#style, this.#escape);
      if (character === "K") return this.#escape === "2" ? "erase all" : this.#escape === "1" ? null : "erase";
    } else {
      this.#escape += character;
      if (this.#escape.length > MAX_ESCAPE) this.#state = TEXT;
    }
    return null;
  }
}

const SWITCHES = {
  1: {bold: true}, 2: {faint: true}, 3: {italic: true}, 4: {underline: true}, 7: {inverse: true}, 9: {strike: true},
  22: {bold: false, faint: false}, 23: {italic: false}, 24: {underline: false}, 27: {inverse: false},
  29: {strike: false}, 39: {front: undefined}, 49: {back: undefined},
};

/** Returns a style changed by the parameters of an SGR sequence. */
function styled(style, parameters) {
  if (!/^[\d;:]*$/.test(parameters)) return style;
  // The form with colons may contain a colour space, or a kind of underline.
  const normalized = parameters.replace(/([34]8:2):\d*(?=(:\d+){3}(;|$))/g, "$1").replace(/(^|;)4:[1-9]/g, "$14");
  const codes = normalized.split(/[;:]/).map(Number);
  let next = {...style};
  for (let index = 0; index < codes.length; index += 1) {
    const code = codes[index];
    if (code === 0) next = {};
    else if (code === 38 || code === 48 || code === 58) {
      const isRgb = codes[index + 1] === 2;
      const color = isRgb ? rgb(codes.slice(index + 2, index + 5)) : indexed(codes[index + 2]);
      index += isRgb ? 4 : 2;
      if (code === 38) next.front = color;
      if (code === 48) next.back = color; // 58 is the colour of underlines
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
  const isValid = parts.length === 3 && parts.every((part) => part >= 0 && part <= 255);
  return isValid ? `#${parts.map((part) => part.toString(16).padStart(2, "0")).join("")}` : undefined;
}
