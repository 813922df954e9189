// Entry point of the page: turns typing, drops, pastes and clicks into queries, and shows results.

import { ask, dataUrl } from "./api.js";
import { $, showError, debounced, latest } from "./dom.js";
import { Grid } from "./grid.js";
import { Inspect } from "./inspect.js";
import { Query, termOf } from "./query.js";
import { followTheme } from "./theme.js";

const PAUSE = 90; // milliseconds after the last key before a search
const STEP = 40; // results per page

followTheme($("theme"));

let first = [];
let wanted = STEP;
let inspect;

const query = new Query((source) => {
  wanted = STEP;
  remember(source);
  search.now();
});

// The address of the page is that of the query. Each change is an entry of the history, and typing
// in one place is a single one.
let source;

function remember(from) {
  const address = query.address();
  const url = location.pathname + (address && `?${address}`);
  const place = location.pathname + location.search;
  if (url !== place && from && from === source) history.replaceState(null, "", url);
  else if (url !== place) history.pushState(null, "", url);
  source = from;
  nameTab();
}

let title = "vlm";

function nameTab() {
  const named = [...query.terms.map(({ name, weight }) => (weight < 0 ? `−${name}` : name)), $("text").value.trim()];
  document.title = [named.filter(Boolean).join(" + "), title].filter(Boolean).join(" · ");
}

let restoring = 0;

async function restore() {
  const mine = (restoring += 1);
  const lost = await query.restore(location.search);
  if (mine !== restoring) return; // a later entry of the history
  source = undefined;
  wanted = STEP;
  nameTab();
  await search.now();
  if (lost.length) showError(new Error(`Not found here: ${lost.join("; ")}.`));
}

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
  showError();
  if (query.isEmpty) {
    $("status").textContent = first.length ? "A sample of the index." : "";
    $("more").hidden = true;
    grid.show(first, false);
    return;
  }
  $("grid").classList.add("busy");
  try {
    const result = await searched(query.body(wanted));
    if (!result || query.isEmpty) return; // replaced by a later search
    const count = result.data.length;
    const words = count === 1 ? "1 result" : `${count || "No"} results`;
    $("status").textContent = `${words} in ${Math.max(1, Math.round(result.seconds * 1000))} ms`;
    $("more").hidden = count < wanted || wanted >= 1000;
    grid.show(result.data, true);
  } catch (error) {
    $("grid").classList.remove("busy");
    showError(error);
  }
});

// ------------------------------------------------------------------------------------ typing

$("text").addEventListener("input", () => {
  wanted = STEP;
  remember($("text"));
  search();
});
$("text").addEventListener("change", () => {
  source = undefined; // the next text is another entry of the history
});
$("form").addEventListener("submit", (event) => event.preventDefault());
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.shiftKey) query.addText(1);
  else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) query.addText(-1);
  else if (event.key === "Enter") {
    source = undefined;
    search.now().then(() => grid.focus(0));
  }
  else if (event.key === "ArrowDown") grid.focus(0);
  else return;
  event.preventDefault();
});
$("plus").addEventListener("click", () => query.addText(1));
$("minus").addEventListener("click", () => query.addText(-1));
$("more").addEventListener("click", () => {
  wanted = Math.min(1000, wanted + STEP);
  search.now();
});
$("least").addEventListener("input", () => {
  query.showLeast();
  remember($("least"));
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

async function searchByImage(file) {
  if (!file) return;
  try {
    const image = await dataUrl(file);
    const name = file.name || "image";
    if (inspect.card.index) query.only({ image, name });
    else inspect.open({ image, name });
  } catch (error) {
    showError(error);
  }
}

const dropped = (event) => [...(event.dataTransfer?.files ?? event.clipboardData?.files ?? [])]
  .find((file) => file.type.startsWith("image/"));

$("pick").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  searchByImage($("file").files[0]);
  $("file").value = "";
});
addEventListener("paste", (event) => {
  const file = dropped(event);
  if (file) {
    event.preventDefault();
    searchByImage(file);
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
  if (file) searchByImage(file);
  else showError(new Error("The dropped file is not an image."));
});

// ------------------------------------------------------------------------------------- start

async function start() {
  const [card] = (await ask("/v1/models")).data;
  const about = card.index ? await ask("/v1/index") : null;
  inspect = new Inspect({
    card,
    times: about?.columns.filter(({ times }) => times).map(({ name }) => name),
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
  title = `${about.name} · vlm`;
  $("about").textContent = `${about.name} · ${about.count.toLocaleString("en")} items · ${card.id}`;
  first = about.first;
  query.drawFilters(about.columns);
  await restore();
  addEventListener("popstate", () => {
    $("inspect").close();
    restore().catch(showError);
  });
  $("text").focus();
}

start().catch(showError);
