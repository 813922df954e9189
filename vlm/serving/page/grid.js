// Grid of results. Arrow keys move between tiles; one tile is in the tab order (roving tabindex).

import { showPicture } from "./api.js";
import { $, make, shortName } from "./dom.js";

// Words on a tile without a picture, by the error code of the server.
const REASONS = {
  picture_missing: "File not found",
  picture_unreadable: "File cannot be read",
  no_item: "No longer in the index",
};

export class Grid {
  // Callbacks of a tile: open(found, at) and alike(found).
  constructor({ open, alike }) {
    this.items = [];
    this.open = open;
    this.alike = alike;
    $("grid").addEventListener("keydown", (event) => this.key(event));
  }

  get tiles() {
    return [...$("grid").querySelectorAll(".tile")];
  }

  show(items, scored) {
    const from = items[0]?.item === this.items[0]?.item && items.length > this.items.length;
    const focused = this.tiles.indexOf(document.activeElement);
    this.items = items;
    const best = Math.max(...items.map((found) => found.score), 1e-6);
    $("grid").replaceChildren(...items.map((found, at) => this.card(found, at, scored, best)));
    $("grid").classList.remove("busy");
    if (focused >= 0) this.focus(from ? focused : Math.min(focused, items.length - 1));
  }

  card(found, at, scored, best) {
    const name = shortName(found.id);
    let picture;
    if (found.picture) {
      picture = make("img", { alt: "", loading: "lazy", decoding: "async" });
      showPicture(picture, found.item, 256, ({ code, message }) => {
        const reason = REASONS[code] ?? "No picture";
        picture.replaceWith(make("span", { class: "words failed", title: message }, reason));
        tile.setAttribute("aria-label", `${tile.getAttribute("aria-label")}, ${reason}`);
      });
    } else {
      picture = make("span", { class: "words" }, String(found.id));
    }
    const score = found.score.toFixed(3);
    const meter = make("i");
    meter.style.width = `${Math.max(0, Math.min(1, found.score / best)) * 100}%`;
    const tile = make("button", {
      type: "button", class: "tile", tabindex: at ? "-1" : "0",
      "aria-label": scored ? `${name}, score ${score}` : name,
      onclick: () => this.open(found, at),
      onfocus: () => this.rove(at),
    },
    make("span", { class: "pic" }, picture),
    scored ? make("span", { class: "meter" }, meter) : null,
    make("span", { class: "under" }, make("span", { class: "id" }, name), scored ? make("span", { class: "value" }, score) : null));
    const alike = make("button", {
      type: "button", class: "alike", tabindex: "-1", "aria-label": `More like ${name}`,
      onclick: () => this.alike(found),
    }, "More like this");
    return make("li", { class: "card" }, tile, alike);
  }

  rove(at) {
    this.tiles.forEach((tile, i) => tile.setAttribute("tabindex", i === at ? "0" : "-1"));
  }

  focus(at) {
    const tile = this.tiles[at];
    tile?.focus();
    tile?.scrollIntoView({ block: "nearest" });
  }

  key(event) {
    const tiles = this.tiles;
    const at = tiles.indexOf(event.target);
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const wide = tiles.findIndex((tile) => tile.getBoundingClientRect().top > tiles[0].getBoundingClientRect().top + 4);
    const columns = wide < 0 ? tiles.length : wide;
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
    if (event.key === "ArrowUp" && at < columns) {
      event.preventDefault();
      $("text").focus();
    } else if (event.key in moves) {
      event.preventDefault();
      const to = at + moves[event.key];
      if (to >= 0 && to < tiles.length) this.focus(to);
    } else if (event.key === "Home" || event.key === "End") {
      event.preventDefault();
      this.focus(event.key === "Home" ? 0 : tiles.length - 1);
    } else if (event.key.toLowerCase() === "m") {
      event.preventDefault();
      this.alike(this.items[at]);
    }
  }
}
