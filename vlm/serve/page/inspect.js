// One image, large: its scores, where a text is seen in it, and labels typed live.

import { ask, showPicture } from "./api.js";
import { $, debounced, latest, make, shortName } from "./dom.js";
import { paintHeat } from "./heat.js";
import { termOf } from "./query.js";

export class Inspect {
  // query: to add to; step(by): the result before or after, or nothing; card: of the model.
  constructor({ query, step, card }) {
    this.query = query;
    this.card = card;
    this.step = step;
    this.heat = null;
    $("heatForm").hidden = card.modalities.length < 2;
    $("close").addEventListener("click", () => $("inspect").close());
    $("previous").addEventListener("click", () => this.move(-1));
    $("next").addEventListener("click", () => this.move(1));
    $("like").addEventListener("click", () => this.use((term) => query.only(term), 1));
    $("addPlus").addEventListener("click", () => this.use((term) => query.add(term), 1));
    $("addMinus").addEventListener("click", () => this.use((term) => query.add(term), -1));
    $("heatText").addEventListener("input", debounced(250, () => this.explain()));
    $("labels").addEventListener("input", debounced(150, () => this.classify()));
    $("large").addEventListener("load", () => this.place());
    addEventListener("resize", () => this.place());
    $("inspect").addEventListener("keydown", (event) => this.key(event));
    $("inspect").addEventListener("click", (event) => {
      if (event.target === $("inspect")) $("inspect").close(); // outside of it
    });
    const explained = latest((signal, text) =>
      ask("/v1/explain", { image: this.image, text }, signal));
    const classified = latest((signal, labels) =>
      ask("/v1/classify", { images: [this.image], labels }, signal));
    this.ask = { explained, classified };
  }

  // found: an item of the index, or {image, name} of one that was dropped.
  open(found, typed) {
    this.found = found;
    this.image = found.image ?? found.item;
    const name = found.name ?? shortName(found.id);
    $("inspectTitle").textContent = name;
    const shows = found.image !== undefined || found.picture;
    $("large").hidden = !shows;
    $("large").alt = shows ? name : "";
    if (found.image) $("large").src = found.image;
    else if (found.picture) showPicture($("large"), found.item, 1024);
    const steps = found.image === undefined;
    for (const id of ["previous", "next"]) $(id).hidden = !steps;
    for (const id of ["like", "addPlus", "addMinus"]) $(id).hidden = !this.card.index;
    $("score").replaceChildren(...(found.score ? ["score ", make("b", {}, found.score.toFixed(3))] : []));
    const rows = [["id", found.id], ...Object.entries(found.metadata ?? {})];
    $("facts").tBodies[0].replaceChildren(...rows
      .filter(([, value]) => value !== null && value !== undefined)
      .map(([column, value]) => make("tr", {}, make("th", { scope: "row" }, column), make("td", {}, String(value)))));
    if (typed !== undefined) $("heatText").value = typed;
    this.forgetHeat();
    if (!$("inspect").open) $("inspect").showModal();
    this.explain();
    this.classify();
  }

  use(how, weight) {
    const found = this.found;
    $("inspect").close();
    how(found.image ? { image: found.image, name: found.name, weight } : termOf(found, weight));
  }

  move(by) {
    const next = this.step(by);
    if (next) this.open(next);
  }

  key(event) {
    if (event.target.matches("input")) return;
    if (event.key === "ArrowLeft") this.move(-1);
    else if (event.key === "ArrowRight") this.move(1);
    else if (event.key.toLowerCase() === "m" && this.card.index) $("like").click();
    else return;
    event.preventDefault();
  }

  // --------------------------------------------------------------------------------- heat

  forgetHeat() {
    this.heat = null;
    $("heat").hidden = true;
    $("heatSays").textContent = "";
  }

  async explain() {
    const text = $("heatText").value.trim();
    if (!text) return this.forgetHeat();
    if (!this.heat) $("heatSays").textContent = "Looking for it …";
    try {
      const said = await this.ask.explained(text);
      if (!said) return;
      this.heat = said.heat;
      const probability = said.probability === null ? "" : `, probability ${said.probability.toFixed(3)}`;
      const most = Math.max(...said.tokens.map(({ weight }) => Math.abs(weight)), 1e-6);
      const words = said.tokens.map(({ token, weight }) => {
        const word = make("mark", { title: `without it the score falls by ${weight.toFixed(3)}` }, token);
        word.style.setProperty("--share", `${Math.round(100 * Math.max(0, weight) / most)}%`);
        return word;
      });
      $("heatSays").replaceChildren(...words, ` score ${said.score.toFixed(3)}${probability}`);
      this.place();
    } catch (error) {
      this.forgetHeat();
      $("heatSays").textContent = error.message;
    }
  }

  // The canvas lies exactly over the picture, which is fitted into its frame.
  place() {
    const img = $("large"), canvas = $("heat");
    if (!this.heat || !img.naturalWidth) return;
    const box = img.getBoundingClientRect();
    const scale = Math.min(box.width / img.naturalWidth, box.height / img.naturalHeight);
    canvas.hidden = false;
    canvas.style.width = `${img.naturalWidth * scale}px`;
    canvas.style.height = `${img.naturalHeight * scale}px`;
    paintHeat(canvas, this.heat);
  }

  // ------------------------------------------------------------------------------- labels

  async classify() {
    const labels = [...new Set($("labels").value.split(",").map((label) => label.trim()).filter(Boolean))];
    if (!labels.length) return $("bars").replaceChildren();
    try {
      const said = await this.ask.classified(labels);
      if (!said) return;
      const first = said.data[0];
      $("bars").replaceChildren(...first.labels.map(({ label, score }) => {
        const bar = make("i");
        bar.style.width = `${100 * score}%`;
        return make("li", {}, bar, make("span", {}, label), make("span", {}, `${(100 * score).toFixed(1)}%`));
      }));
    } catch (error) {
      $("bars").replaceChildren(make("li", {}, make("span", {}, error.message)));
    }
  }
}
