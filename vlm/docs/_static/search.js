// The search page: Pagefind's index of the site, which the build wrote beside the pages.
const SHOWN = 20;

/**
 * Return Pagefind's results, the best first; those of the single words if no page has all of them,
 * or one page alone, which may be a list of all names.
 */
export async function find(pagefind, query) {
  const { results } = await pagefind.search(query);
  if (results.length > 1) return results;
  const found = new Map();
  for (const word of new Set(query.toLowerCase().match(/[\p{L}\p{N}_.-]+/gu) ?? [])) {
    const pages = (await pagefind.search(word)).results;
    for (const page of pages) {
      const known = found.get(page.id) ?? { ...page, score: 0 };
      known.score += page.score / pages.length; // a rare word says more
      found.set(page.id, known);
    }
  }
  return [...found.values()].sort((a, b) => b.score - a.score);
}

function link(url, text) {
  const a = document.createElement("a");
  a.href = url;
  a.textContent = text;
  return a;
}

function excerpt(html) {
  const p = document.createElement("p");
  p.innerHTML = html; // Pagefind escapes the text and adds <mark>
  return p;
}

function entry(page) {
  const item = document.createElement("li");
  item.append(link(page.url, page.meta.title ?? page.url));
  const sections = page.sub_results.filter((part) => part.url.includes("#")).slice(0, 3);
  if (!sections.length) item.append(excerpt(page.excerpt));
  for (const part of sections) {
    const section = document.createElement("section");
    section.append(link(part.url, part.title), excerpt(part.excerpt));
    item.append(section);
  }
  return item;
}

async function show() {
  const root = new URL("..", import.meta.url);
  const status = document.getElementById("search-status");
  const query = new URLSearchParams(location.search).get("q")?.trim() ?? "";
  for (const input of document.querySelectorAll("input[name=q]")) input.value = query;
  status.textContent = query ? "Searching" : "Type a word or a question.";
  if (!query) return;
  const pagefind = await import(new URL("pagefind/pagefind.js", root));
  await pagefind.options({ baseUrl: root.pathname });
  const results = await find(pagefind, query);
  const pages = await Promise.all(results.slice(0, SHOWN).map((result) => result.data()));
  document.getElementById("search-results").append(...pages.map(entry));
  status.textContent = `${results.length} ${results.length === 1 ? "page" : "pages"} for "${query}"`;
}

if (globalThis.document?.getElementById("search-results")) show();
