// The query: typed text, added terms, metadata filters and minimum score.

import { showPicture } from "./api.js";
import { $, make, shortName } from "./dom.js";

export class Query {
  constructor(changed) {
    this.terms = []; // {text | image | item, name, weight}
    this.columns = [];
    this.changed = changed;
  }

  get isEmpty() {
    return !this.terms.length && !$("text").value.trim();
  }

  add(term) {
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
    for (const { name, kind, inputs } of this.columns) {
      for (const [comparison, input] of inputs) {
        if (input.value === "") continue;
        const isNumber = kind === "number" || input.selectedOptions?.[0]?.dataset.number;
        found.push({ column: name, comparison, value: isNumber ? Number(input.value) : input.value });
      }
    }
    return found;
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
    const changed = () => {
      const count = this.conditions().length;
      $("filterCount").textContent = count;
      $("filterCount").hidden = !count;
      this.changed();
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

export function termOf(found, weight = 1) {
  return { item: found.item, name: shortName(found.id), weight };
}
