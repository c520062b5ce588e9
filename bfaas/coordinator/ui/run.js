// One run: the script goes out, events come in. Knows nothing of the page.

/** What went wrong before or after output, in words for a person. `retryAfter` is in seconds, or null. */
export class RunError extends Error {
  constructor(message, retryAfter = null) {
    super(message);
    this.retryAfter = retryAfter;
  }
}

/**
 * Runs a script. Calls `begun(headers)` once, then `output(stream, text)` as text comes; resolves with the
 * exit. Rejects with a RunError, or with an AbortError once `signal` is aborted.
 */
export async function run(script, signal, {begun, output}) {
  const response = await reach(script, signal);
  if (!response.ok) throw await refusal(response);
  begun(response.headers);
  let exit = null;
  try {
    for await (const [name, data] of events(response.body)) {
      if (name === "exit") exit = data;
      else if (name === "stdout" || name === "stderr") output(name, data);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // Whatever comes after the exit, the run is whole.
    if (exit === null) throw new RunError("The connection broke. The script may have been ended; output may be missing.");
  }
  if (exit === null) throw new RunError("The answer stopped without an exit. Output may be missing.");
  return exit;
}

async function reach(script, signal) {
  try {
    return await fetch("run", {method: "POST", body: script, signal, cache: "no-store"});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RunError("The coordinator could not be reached. Is it running, and are you connected?");
  }
}

async function refusal(response) {
  const line = (await response.text().catch(() => "")).trim().slice(0, 300);
  const after = Number.parseInt(response.headers.get("Retry-After"), 10);
  const said = `${response.status}: ${line || response.statusText || "no reason was given"}`;
  return new RunError(said, Number.isFinite(after) ? after : null);
}

/** Reads server-sent events whose data is JSON: pairs of name and data. Comments are skipped. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let rested = performance.now();
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    held += value;
    let start = 0;
    for (let end; (end = held.indexOf("\n\n", start)) !== -1; start = end + 2) {
      const event = parse(held.slice(start, end));
      if (event) yield event;
    }
    held = held.slice(start);
    // Much output must not keep the browser from drawing and from hearing Cancel. Timers are slow, and
    // there is nothing to draw, while the page is hidden.
    if (!document.hidden && performance.now() - rested > 12) {
      await new Promise((resolve) => setTimeout(resolve));
      rested = performance.now();
    }
  }
}

function parse(block) {
  let name = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5));
  }
  return data.length ? [name, JSON.parse(data.join("\n"))] : null;
}
