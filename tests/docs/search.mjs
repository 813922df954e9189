// Run the site's own search for each query on stdin; print the pages found, one JSON list each.
import { readFileSync } from "node:fs";

const base = `file://${process.argv[2]}/`;
globalThis.document = { querySelector: () => ({ getAttribute: () => "en" }), getElementById: () => null };
globalThis.window = globalThis;
globalThis.location = new URL(base);
globalThis.fetch = async (url) => new Response(readFileSync(new URL(String(url).split("?")[0], base)));

const { find } = await import(`${base}_static/search.js`);
const pagefind = await import(`${base}pagefind/pagefind.js`);
await pagefind.options({ baseUrl: "/" });
for (const query of readFileSync(0, "utf8").trimEnd().split("\n")) {
  const pages = await Promise.all((await find(pagefind, query)).slice(0, 5).map((page) => page.data()));
  console.log(JSON.stringify(pages.map((page) => page.raw_url ?? page.url)));
}
