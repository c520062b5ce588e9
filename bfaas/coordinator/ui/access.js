// The access token, if the coordinator requires one. It is kept in the tab's session storage, and sent to this
// coordinator alone.

import {byId} from "./dom.js";
import {load, store} from "./storage.js";

const KEY = "token";

let token = load(KEY) ?? "";

/** Whether the user has entered a token. */
export const hasToken = () => token !== "";

/** Like `fetch`, with the token. If the coordinator does not accept it, or requires one, the page asks for it. */
export async function fetchWithToken(path, options) {
  const sent = token;
  const headers = sent ? {...options.headers, Authorization: `Bearer ${sent}`} : options.headers;
  const response = await fetch(path, {...options, headers, cache: "no-store"});
  // An answer to a token that was replaced in the meantime says nothing about the new one.
  if (response.status === 401 && sent === token) {
    ask(sent ? "The coordinator does not accept this access token." : "This coordinator requires an access token.");
  } else if (response.ok && sent === token) byId("access").hidden = true;
  return response;
}

/** Handles the form. `onChange()` is called when the user has entered or removed a token. */
export function listen(onChange) {
  byId("access").addEventListener("submit", (event) => {
    event.preventDefault();
    // As `bfaas token` prints it, or without the name of the variable.
    const text = byId("token").value.trim().replace(/^BFAAS_TOKEN=/, "");
    if (!/^[\w.~+/=-]+$/.test(text)) return ask("This is not an access token.");
    byId("token").value = "";
    byId("access").hidden = true;
    change(text);
  });
  byId("forget").addEventListener("click", () => change(""));
  byId("forget").hidden = !hasToken();

  function change(text) {
    token = text;
    store(KEY, token);
    byId("forget").hidden = !hasToken();
    onChange();
  }
}

function ask(reason) {
  byId("access-reason").textContent = reason;
  byId("access").hidden = false;
}
