// Dialog for one image: its score, a heat map for a text, and live classification.

import { ask, openOriginal, showPicture } from "./api.js";
import { $, copyText, debounced, latest, make, shortName } from "./dom.js";
import { paintHeat } from "./heat.js";
import { termOf } from "./query.js";

export class Inspect {
  // query: the Query to change; step(by): returns a neighbouring result, if any; card: model card.
  // times: columns of nanoseconds since 1970.
  constructor({ query, step, card, times = [] }) {
    this.times = new Set(times);
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
    $("copy").addEventListener("click", () => this.copy());
    $("original").addEventListener("click", (event) =>
      openOriginal(event, this.found.item).catch((error) => { $("done").textContent = error.message; }));
    $("heatText").addEventListener("input", debounced(250, () => this.explain()));
    $("labels").addEventListener("input", debounced(150, () => this.classify()));
    $("large").addEventListener("load", () => this.place());
    addEventListener("resize", () => this.place());
    $("inspect").addEventListener("keydown", (event) => this.key(event));
    $("inspect").addEventListener("click", (event) => {
      if (event.target === $("inspect")) $("inspect").close(); // a click on the backdrop
    });
    const explained = latest((signal, text) =>
      ask("/v1/explain", { image: this.image, text }, signal));
    const classified = latest((signal, labels) =>
      ask("/v1/classify", { images: [this.image], labels }, signal));
    this.ask = { explained, classified };
  }

  // found: an item of the index, or {image, name} of an uploaded image.
  open(found, typed) {
    this.found = found;
    this.image = found.image ?? found.item;
    const name = found.name ?? shortName(found.id);
    $("inspectTitle").textContent = name;
    const shows = found.image !== undefined || found.picture;
    $("large").hidden = !shows;
    $("large").alt = shows ? name : "";
    $("pictureProblem").hidden = true;
    $("done").textContent = "";
    if (found.image) $("large").src = found.image;
    else if (found.picture) this.show(found);
    const ofIndex = found.id !== undefined;
    $("copy").hidden = !ofIndex;
    $("copy").textContent = found.picture ? "Copy path" : "Copy id";
    $("original").hidden = !(ofIndex && found.picture);
    $("original").href = ofIndex ? `/v1/items/${found.item}/original` : "";
    const steps = found.image === undefined;
    for (const id of ["previous", "next"]) $(id).hidden = !steps;
    for (const id of ["like", "addPlus", "addMinus"]) $(id).hidden = !this.card.index;
    $("score").replaceChildren(...(found.score ? ["score ", make("b", {}, found.score.toFixed(3))] : []));
    const rows = [["id", found.id], ...Object.entries(found.metadata ?? {})];
    $("facts").tBodies[0].replaceChildren(...rows
      .filter(([, value]) => value !== null && value !== undefined)
      .map(([column, value]) => make("tr", {}, make("th", { scope: "row" }, column), make("td", {}, this.shown(column, value)))));
    if (typed !== undefined) $("heatText").value = typed;
    this.clearHeat();
    if (!$("inspect").open) $("inspect").showModal();
    this.explain();
    this.classify();
  }

  show(found) {
    // A new element: a late picture of an earlier item must not replace this one.
    const img = $("large").cloneNode();
    img.removeAttribute("src");
    $("large").replaceWith(img);
    img.addEventListener("load", () => this.place());
    showPicture(img, found.item, 1024, ({ message }) => {
      if (this.found !== found) return;
      img.hidden = $("original").hidden = true;
      $("pictureProblem").textContent = message;
      $("pictureProblem").hidden = false;
      if ($("heatStatus").textContent === message) $("heatStatus").textContent = "";
    });
  }

  shown(column, value) {
    return this.times.has(column) ? new Date(value / 1e6).toLocaleString() : String(value);
  }

  async copy() {
    const what = $("copy").textContent.slice("Copy ".length);
    const done = await copyText(String(this.found.id), $("inspect"));
    $("done").textContent = done ? `Copied the ${what}.` : `The browser does not allow copying: select the ${what} below.`;
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

  clearHeat() {
    this.heat = null;
    $("heat").hidden = true;
    $("heatStatus").textContent = "";
  }

  async explain() {
    const text = $("heatText").value.trim();
    if (!text) return this.clearHeat();
    if (!this.heat) $("heatStatus").textContent = "Computing the heat map …";
    try {
      const result = await this.ask.explained(text);
      if (!result) return;
      this.heat = result.heat;
      const probability = result.probability === null ? "" : `, probability ${result.probability.toFixed(3)}`;
      const most = Math.max(...result.tokens.map(({ weight }) => Math.abs(weight)), 1e-6);
      const words = result.tokens.map(({ token, weight }) => {
        const word = make("mark", { title: `without this token the score drops by ${weight.toFixed(3)}` }, token);
        word.style.setProperty("--share", `${Math.round(100 * Math.max(0, weight) / most)}%`);
        return word;
      });
      $("heatStatus").replaceChildren(...words, ` score ${result.score.toFixed(3)}${probability}`);
      this.place();
    } catch (error) {
      this.clearHeat();
      const known = error.message === $("pictureProblem").textContent && !$("pictureProblem").hidden;
      $("heatStatus").textContent = known ? "" : error.message;
    }
  }

  // Align the canvas with the picture, which is fitted into its frame.
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
      const result = await this.ask.classified(labels);
      if (!result) return;
      const first = result.data[0];
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
