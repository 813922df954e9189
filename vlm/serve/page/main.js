// The page: what is typed, dropped, pasted or clicked becomes a query, and its answers a grid.

import { ask, dataUrl } from "./api.js";
import { $, complain, debounced, latest } from "./dom.js";
import { Grid } from "./grid.js";
import { Inspect } from "./inspect.js";
import { Query, termOf } from "./query.js";
import { followTheme } from "./theme.js";

const PAUSE = 90; // milliseconds without a key before a search
const STEP = 40; // results that are shown at first, and more each time

followTheme($("theme"));

let first = [];
let wanted = STEP;
let inspect;

const query = new Query(() => {
  wanted = STEP;
  search.now();
});

const grid = new Grid({
  open: (found, at) => {
    opened = at;
    inspect.open(found, $("text").value.trim());
  },
  alike: (found) => {
    query.only(termOf(found));
    grid.focus(0);
  },
});
let opened = 0;

const searched = latest((signal, body) => ask("/v1/search", body, signal));

const search = debounced(PAUSE, async () => {
  complain();
  if (query.isEmpty) {
    $("status").textContent = first.length ? "A few of the pictures, to begin with." : "";
    $("more").hidden = true;
    grid.show(first, false);
    return;
  }
  $("grid").classList.add("busy");
  try {
    const said = await searched(query.body(wanted));
    if (!said || query.isEmpty) return; // a later one has taken its place
    const count = said.data.length;
    const words = count === 1 ? "1 result" : `${count || "No"} results`;
    $("status").textContent = `${words} in ${Math.max(1, Math.round(said.seconds * 1000))} ms`;
    $("more").hidden = count < wanted || wanted >= 1000;
    grid.show(said.data, true);
  } catch (error) {
    $("grid").classList.remove("busy");
    complain(error);
  }
});

// ------------------------------------------------------------------------------------ typing

$("text").addEventListener("input", () => {
  wanted = STEP;
  search();
});
$("form").addEventListener("submit", (event) => event.preventDefault());
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.shiftKey) query.keepText(1);
  else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) query.keepText(-1);
  else if (event.key === "Enter") search.now().then(() => grid.focus(0));
  else if (event.key === "ArrowDown") grid.focus(0);
  else return;
  event.preventDefault();
});
$("plus").addEventListener("click", () => query.keepText(1));
$("minus").addEventListener("click", () => query.keepText(-1));
$("more").addEventListener("click", () => {
  wanted = Math.min(1000, wanted + STEP);
  search.now();
});
$("least").addEventListener("input", () => {
  const least = Number($("least").value);
  $("leastValue").textContent = least > -1 ? least.toFixed(2) : "any";
  search();
});

addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const typing = event.target.matches("input:not([type=range]), select, textarea");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("text").focus();
    $("text").select();
  } else if (event.key === "Escape") {
    query.clear();
    $("text").focus();
  }
});

// ------------------------------------------------------------------------------------ images

async function take(file) {
  if (!file) return;
  try {
    const image = await dataUrl(file);
    const name = file.name || "the image";
    if (inspect.card.index) query.only({ image, name });
    else inspect.open({ image, name });
  } catch (error) {
    complain(error);
  }
}

const dropped = (event) => [...(event.dataTransfer?.files ?? event.clipboardData?.files ?? [])]
  .find((file) => file.type.startsWith("image/"));

$("pick").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  take($("file").files[0]);
  $("file").value = "";
});
addEventListener("paste", (event) => {
  const file = dropped(event);
  if (file) {
    event.preventDefault();
    take(file);
  }
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("on");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").classList.remove("on");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("on");
  const file = dropped(event);
  if (file) take(file);
  else complain(new Error("What was dropped is not an image file."));
});

// ------------------------------------------------------------------------------------- start

async function start() {
  const [card] = (await ask("/v1/models")).data;
  inspect = new Inspect({
    card,
    query,
    step: (by) => {
      const to = opened + by;
      if (to < 0 || to >= grid.items.length) return undefined;
      opened = to;
      grid.rove(to);
      return grid.items[to];
    },
  });
  if (!card.index) {
    $("about").textContent = card.id;
    $("text").disabled = $("plus").disabled = $("minus").disabled = true;
    $("text").placeholder = "No index to search: drop an image to classify it";
    $("narrow").hidden = $("hint").hidden = true;
    document.title = card.id;
    return;
  }
  const about = await ask("/v1/index");
  document.title = `${about.name} · vlm`;
  $("about").textContent = `${about.name} · ${about.count.toLocaleString("en")} items · ${card.id}`;
  first = about.first;
  query.drawFilters(about.columns);
  await search.now();
  $("text").focus();
}

start().catch(complain);
