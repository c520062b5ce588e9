// The tab's session storage: it survives a reload, and ends with the tab.

/** Returns what `store` has stored; null if there is nothing, or if storage is not available. */
export function load(key) {
  try {
    return JSON.parse(sessionStorage.getItem(key));
  } catch {
    return null;
  }
}

/** Stores a value for this tab. If it does not fit, or storage is not available, an older value is removed. */
export function store(key, value) {
  try {
    sessionStorage.setItem(key, JSON.stringify(value));
  } catch {
    try {
      sessionStorage.removeItem(key);
    } catch {
      // Storage is switched off: nothing is kept.
    }
  }
}
