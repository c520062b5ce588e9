// One run: sends the script, and reads the events.

import {fetchWithToken} from "./access.js";

/** A run that failed, before or after output. The message is for users. `retryAfter` is in seconds, or null. */
export class RunError extends Error {
  constructor(message, retryAfter = null) {
    super(message);
    this.retryAfter = retryAfter;
  }
}

/**
 * Sends a request with a body and headers. Calls `started(headers)` once, then `output(stream, text)` for each
 * piece of output and `file(data)` for each piece of a file; resolves with the exit. Rejects with a RunError, or
 * with an AbortError if `signal` is aborted.
 */
export async function runScript(request, signal, {started, output, file}) {
  const response = await send(request, signal);
  if (!response.ok) throw await httpError(response);
  started(response.headers);
  let exit = null;
  try {
    for await (const [name, data] of events(response.body)) {
      if (name === "exit") exit = data;
      else if (name === "stdout" || name === "stderr") output(name, data);
      else if (name === "file") file(data);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // Once the exit has arrived, the run is complete.
    if (exit === null) throw new RunError("The connection was lost. The script may have been stopped; output may be missing.");
  }
  if (exit === null) throw new RunError("The response ended without an exit status. Output may be missing.");
  return exit;
}

async function send({body, headers}, signal) {
  try {
    return await fetchWithToken("run", {method: "POST", body, headers, signal});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RunError("The coordinator could not be reached. Is it running, and are you online?");
  }
}

async function httpError(response) {
  const reason = (await response.text().catch(() => "")).trim().slice(0, 300);
  const retryAfter = Number.parseInt(response.headers.get("Retry-After"), 10);
  const message = `${response.status}: ${reason || response.statusText || "no reason given"}`;
  return new RunError(message, Number.isFinite(retryAfter) ? retryAfter : null);
}

/** Yields server-sent events whose data is JSON, as pairs of name and data. Comments are skipped. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let yieldedAt = performance.now();
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    buffer += value;
    let start = 0;
    for (let end; (end = buffer.indexOf("\n\n", start)) !== -1; start = end + 2) {
      const event = parseEvent(buffer.slice(start, end));
      if (event) yield event;
    }
    buffer = buffer.slice(start);
    // Give the browser time to draw and to handle Cancel during large output. While the page is hidden there
    // is nothing to draw, and timers are slow.
    if (!document.hidden && performance.now() - yieldedAt > 12) {
      await new Promise((resolve) => setTimeout(resolve));
      yieldedAt = performance.now();
    }
  }
}

function parseEvent(block) {
  let name = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5));
  }
  return data.length ? [name, JSON.parse(data.join("\n"))] : null;
}
