// DOM helpers.

export const $ = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function debounced(milliseconds, run) {
  let timer;
  const later = (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => run(...values), milliseconds);
  };
  later.now = (...values) => {
    clearTimeout(timer);
    return run(...values);
  };
  return later;
}

// Only the latest request counts: earlier ones are aborted.
export function latest(run) {
  let current;
  return async (...values) => {
    current?.abort();
    const mine = (current = new AbortController());
    try {
      return await run(mine.signal, ...values);
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    }
  };
}

// Ids are often long paths; the file name is the most useful part.
export function shortName(id) {
  return String(id).split(/[\\/]/).pop() || String(id);
}

// Copy a text; navigator.clipboard exists only on https and localhost. `near` contains the focus.
export async function copyText(text, near) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const focused = document.activeElement;
    const area = make("textarea", { class: "hidden", "aria-hidden": "true", tabindex: "-1" });
    area.value = text;
    near.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return done;
  }
}

export function showError(error) {
  const box = $("problem");
  box.textContent = error ? error.message : "";
  box.hidden = !error;
}
