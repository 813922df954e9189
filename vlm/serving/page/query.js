// The query: typed text, added terms, metadata filters and minimum score. It has an address:
// ?q=TEXT&term=WEIGHT,KIND,VALUE&where=COLUMN>=VALUE&least=SCORE

import { ask, showPicture } from "./api.js";
import { $, make, shortName } from "./dom.js";

export class Query {
  // changed(source): called after a change; source is the element of a continuous one.
  constructor(changed) {
    this.terms = []; // {text | image | item, id, name, weight}
    this.columns = [];
    this.uploads = new Map(); // images of this visit by name, which an address cannot hold
    this.changed = changed;
  }

  get isEmpty() {
    return !this.terms.length && !$("text").value.trim();
  }

  add(term) {
    if (term.image) {
      const same = [...this.uploads.values()].includes(term.image);
      for (let n = 2; this.uploads.has(term.name) && !same; n += 1) term = { ...term, name: `${term.name} ${n}` };
      this.uploads.set(term.name, term.image);
    }
    this.terms.push({ weight: 1, ...term });
    this.draw();
    this.changed();
  }

  only(term) {
    this.terms = [];
    $("text").value = "";
    this.add(term);
  }

  addText(weight) {
    const text = $("text").value.trim();
    if (!text) return $("text").focus();
    $("text").value = "";
    this.add({ text, name: text, weight });
    $("text").focus();
  }

  clear() {
    this.terms = [];
    $("text").value = "";
    this.draw();
    this.changed();
  }

  body(k) {
    const typed = $("text").value.trim();
    const query = this.terms.map(({ text, image, item, weight }) => ({ text, image, item, weight }));
    if (typed) query.push({ text: typed, weight: 1 });
    const least = Number($("least").value);
    return { query, k, where: this.conditions(), min_score: least > -1 ? least : null };
  }

  conditions() {
    const found = [];
    for (const { name, kind, times, inputs } of this.columns) {
      for (const [comparison, input] of inputs) {
        if (input.value === "") continue;
        if (kind === "date") {
          found.push(...dateConditions(name, comparison, input.value, times));
          continue;
        }
        const isNumber = kind === "number" || input.selectedOptions?.[0]?.dataset.number;
        found.push({ column: name, comparison, value: isNumber ? Number(input.value) : input.value });
      }
    }
    return found;
  }

  // ------------------------------------------------------------------------------- address

  address() {
    const found = new URLSearchParams();
    const typed = $("text").value.trim();
    if (typed) found.set("q", typed);
    for (const { text, item, id, name, weight } of this.terms) {
      const [kind, value] = text !== undefined ? ["text", text] : item !== undefined ? ["item", id] : ["image", name];
      found.append("term", `${weight},${kind},${value}`);
    }
    for (const [start, input] of this.inputs()) {
      if (input.value !== "") found.append("where", start + input.value);
    }
    if (Number($("least").value) > -1) found.set("least", $("least").value);
    return String(found);
  }

  // Pairs of the start of a condition in an address, such as "year>=", and its input.
  inputs() {
    return this.columns.flatMap(({ name, inputs }) => inputs.map(([comparison, input]) => [name + comparison, input]));
  }

  // Take the query from an address; returns what the address names and this page does not have.
  async restore(address) {
    const given = new URLSearchParams(address);
    const lost = [];
    const terms = await Promise.all(given.getAll("term").map(async (text) => {
      const [, weight, kind, value] = /^(-?\d+(?:\.\d+)?),(text|item|image),(.+)$/s.exec(text) ?? [];
      const term = { weight: Number(weight), name: value };
      if (kind === "text") return { ...term, text: value };
      if (kind === "image" && this.uploads.has(value)) return { ...term, image: this.uploads.get(value) };
      const found = kind === "item" && await ask(`/v1/items?id=${encodeURIComponent(value)}`).catch(() => null);
      if (found) return termOf(found, term.weight);
      lost.push(kind === "image" ? `the image ${value}, which is only on another computer or was closed` : value ?? text);
      return null;
    }));
    this.terms = terms.filter((term) => term?.weight);
    $("text").value = given.get("q") ?? "";
    $("least").value = given.get("least") ?? "-1";
    const wanted = given.getAll("where");
    for (const [start, input] of this.inputs()) {
      const condition = wanted.find((text) => text.startsWith(start));
      input.value = condition?.slice(start.length) ?? "";
      if (condition !== undefined && input.value !== "") wanted.splice(wanted.indexOf(condition), 1);
    }
    lost.push(...wanted);
    this.draw();
    this.countFilters();
    this.showLeast();
    return lost;
  }

  showLeast() {
    const least = Number($("least").value);
    $("leastValue").textContent = least > -1 ? least.toFixed(2) : "any";
  }

  countFilters() {
    const count = this.inputs().filter(([, input]) => input.value !== "").length;
    $("filterCount").textContent = count;
    $("filterCount").hidden = !count;
    if (count) $("filters").open = true;
  }

  // ------------------------------------------------------------------------------- drawing

  draw() {
    $("terms").replaceChildren(...this.terms.map((term) => this.drawTerm(term)));
  }

  drawTerm(term) {
    const minus = term.weight < 0;
    const redraw = (focus) => {
      const at = this.terms.indexOf(term);
      this.draw();
      $("terms").children[at]?.querySelector(focus)?.focus();
      this.changed();
    };
    const sign = make("button", {
      type: "button", class: "sign",
      "aria-label": minus ? `without ${term.name}: change to with` : `with ${term.name}: change to without`,
      onclick: () => { term.weight = -term.weight; redraw(".sign"); },
    }, minus ? "−" : "+");
    const weight = make("input", {
      type: "number", min: "0.1", max: "10", step: "0.5", value: Math.abs(term.weight),
      "aria-label": `weight of ${term.name}`,
      onchange: (event) => {
        const value = Math.min(10, Math.max(0.1, Number(event.target.value) || 1));
        term.weight = minus ? -value : value;
        redraw("input");
      },
    });
    const remove = make("button", {
      type: "button", "aria-label": `remove ${term.name}`,
      onclick: () => {
        this.terms = this.terms.filter((other) => other !== term);
        this.draw();
        this.changed();
        $("text").focus();
      },
    }, "✕");
    let picture = null;
    if (term.text === undefined) {
      picture = make("img", { alt: "" });
      if (term.image) picture.src = term.image;
      else showPicture(picture, term.item, 64);
    }
    const name = make("span", { class: "name", title: term.name }, term.name);
    return make("li", { class: minus ? "term minus" : "term" }, sign, picture, name, weight, remove);
  }

  drawFilters(columns) {
    const changed = (event) => {
      this.countFilters();
      this.changed(event.type === "input" ? event.target : undefined);
    };
    $("filters").hidden = !columns.length;
    $("columns").replaceChildren(...columns.map((column) => {
      const legend = make("legend", {}, column.name);
      if (column.values) {
        const options = column.values.map((value) => make("option", {
          value, "data-number": typeof value === "string" ? undefined : "1",
        }, String(value)));
        const select = make("select", { "aria-label": column.name, onchange: changed },
          make("option", { value: "" }, "any"), ...options);
        this.columns.push({ ...column, kind: "choice", inputs: [["=", select]] });
        return make("fieldset", {}, legend, select);
      }
      if (column.kind === "date") {
        const day = (label) => make("input", { type: "date", "aria-label": `${column.name}, ${label}`, onchange: changed });
        const from = day("from"), to = day("to");
        this.columns.push({ ...column, inputs: [[">=", from], ["<=", to]] });
        const span = make("p", { class: "span" }, `${column.earliest} to ${column.latest}`);
        const row = (word, input) => make("div", { class: "day" }, make("span", { "aria-hidden": "true" }, word), input);
        return make("fieldset", {}, legend, span, row("from", from), row("to", to));
      }
      if (column.kind === "text") {
        const input = make("input", { type: "text", "aria-label": column.name, placeholder: "exact match", oninput: changed });
        this.columns.push({ ...column, inputs: [["=", input]] });
        return make("fieldset", {}, legend, input);
      }
      const bound = (label, placeholder) => make("input", {
        type: "number", step: "any", placeholder, "aria-label": `${column.name}, ${label}`, oninput: changed,
      });
      const low = bound("at least", column.least), high = bound("at most", column.most);
      this.columns.push({ ...column, inputs: [[">=", low], ["<=", high]] });
      return make("fieldset", {}, legend, make("div", { class: "range" }, low, high));
    }));
  }
}

// Conditions of a day in a filter of dates. Times are compared with the user's midnight.
function dateConditions(column, comparison, day, times) {
  const [year, month, date] = day.split("-").map(Number);
  const after = comparison === "<=" ? 1 : 0; // up to the end of the day
  const midnight = new Date(year, month - 1, date + after);
  const text = new Date(Date.UTC(year, month - 1, date + after)).toISOString().slice(0, 10);
  const value = times ? midnight.toISOString() : text;
  if (!after) return [{ column, comparison, value }];
  const known = times ? [] : [{ column, comparison: ">=", value: "0000" }]; // missing dates are ""
  return [...known, { column, comparison: "<", value }];
}

export function termOf(found, weight = 1) {
  return { item: found.item, id: found.id, name: shortName(found.id), weight };
}
