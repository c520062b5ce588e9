// Helpers for the document.

export const byId = (id) => document.getElementById(id);

/** An element that contains text only. */
export function element(name, text, classes = "") {
  const created = document.createElement(name);
  created.textContent = text;
  if (classes) created.className = classes;
  return created;
}

/** A term and its value, for a description list. */
export function descriptionItem(term, value) {
  const item = document.createElement("div");
  item.append(element("dt", term), element("dd", value));
  return item;
}
