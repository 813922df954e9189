"""The look of a report: its style sheet and the frame around its sections."""

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #171a21; --soft: #5d6575; --edge: #e2e5eb;
  --c0: #3b5bdb; --c1: #0c8599; --c2: #e8590c; --c3: #862e9c;
  --good: #2b8a3e; --good-wash: #d3f9d8; --bar: #dbe4ff; }
@media (prefers-color-scheme: dark) { :root {
  --page: #101216; --card: #181b21; --ink: #e9ebf0; --soft: #99a1b1; --edge: #2a2f39;
  --c0: #8aa4ff; --c1: #3bc9db; --c2: #ffa94d; --c3: #da77f2;
  --good: #69db7c; --good-wash: #1b3a24; --bar: #2c3860; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 44px 24px 64px }
h1 { font-size: 32px; line-height: 1.2; letter-spacing: -.02em; margin: 0 }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 44px 0 4px }
h3 { font-size: 14px; margin: 0 0 8px }
p { margin: 4px 0 14px; max-width: 75ch } .soft { color: var(--soft) }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 12px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(195px, 1fr)); gap: 14px;
  margin: 26px 0 14px }
.tile { padding: 16px 18px } .tile b { display: block; font-size: 30px; line-height: 1.2;
  letter-spacing: -.02em; font-variant-numeric: tabular-nums }
.tile span { display: block; font-size: 13px; color: var(--soft) }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(245px, 1fr)); gap: 12px 14px;
  margin: 0; padding: 16px 18px } dl div { min-width: 0 }
dt { font-size: 12.5px; color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr));
  gap: 14px; margin-top: 12px }
.chart { padding: 16px 12px 8px 16px } svg { display: block; width: 100%; height: auto }
.rule { stroke: var(--edge) } .tick, .axis { fill: var(--soft); font-size: 12px }
.tick { font-variant-numeric: tabular-nums }
.line { fill: none; stroke: currentColor; stroke-width: 2.2; stroke-linejoin: round }
.faint { stroke-width: 1; opacity: .3 } .band { fill: currentColor; opacity: .14 }
.dot { fill: currentColor } .name { fill: currentColor; font-size: 13px; font-weight: 600 }
.value { font-weight: 400; font-variant-numeric: tabular-nums }
.c0 { color: var(--c0) } .c1 { color: var(--c1) } .c2 { color: var(--c2) } .c3 { color: var(--c3) }
.scroll { overflow-x: auto; margin-top: 12px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; font-size: 12.5px; font-weight: 500; color: var(--soft) }
th, td { padding: 8px 18px; border-bottom: 1px solid var(--edge); white-space: nowrap }
tr:last-child td { border-bottom: 0 } .right { text-align: right }
.interval { position: relative; width: 150px; height: 18px }
.interval i { position: absolute; inset: 8px 0 auto 0; height: 2px; background: var(--edge) }
.interval u { position: absolute; top: 6px; height: 6px; border-radius: 3px; background: var(--c0);
  opacity: .35 }
.interval s { position: absolute; top: 3px; width: 3px; height: 12px; border-radius: 2px;
  margin-left: -1.5px; background: var(--c0) }
.gallery { display: grid; gap: 14px; margin-top: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)) }
.shot { display: flex; gap: 14px; padding: 12px } .shot > div { flex: 1; min-width: 0 }
.shot img { width: 104px; height: 104px; flex: none }
img { object-fit: contain; border-radius: 8px; background: #fff; border: 1px solid var(--edge) }
.guess { position: relative; display: flex; justify-content: space-between; gap: 10px;
  padding: 1px 7px; margin-bottom: 2px; font-size: 13px; border-radius: 5px; overflow: hidden }
.guess i { position: absolute; inset: 0 auto 0 0; background: var(--bar) }
.guess span { position: relative; overflow-wrap: anywhere }
.guess span + span { flex: none; color: var(--soft); font-variant-numeric: tabular-nums }
.is-right { font-weight: 650; color: var(--good) } .is-right i { background: var(--good-wash) }
.guess.is-right i + span::before { content: "\\2713\\00a0" } /* not by colour alone */
.missed { font-size: 12.5px; color: var(--soft); padding: 3px 7px 0 }
.query { padding: 14px } .strip { display: grid; grid-template-columns: repeat(6, 1fr); gap: 8px }
.strip figure { margin: 0 } .strip img { width: 100%; aspect-ratio: 1; display: block }
.strip .is-right img { outline: 3px solid var(--good); border-color: transparent }
.strip figcaption { text-align: center; font-size: 12px; color: var(--soft);
  font-variant-numeric: tabular-nums; margin-top: 2px }
details { padding: 12px 18px; margin-top: 12px } summary { cursor: pointer }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace }
footer { margin-top: 40px; padding-top: 18px; border-top: 1px solid var(--edge); font-size: 13.5px;
  color: var(--soft) }
@media print { body { background: #fff } .card { break-inside: avoid } }
"""


def page(title: str, lead: str, sections: Sequence[str], foot: Sequence[str]) -> str:
    """A whole HTML document, with nothing in it that a browser would have to fetch.

    Args:
        title: plain text, of the window and the first heading.
        lead: plain text under it.
        sections: HTML.
        foot: plain texts, one paragraph each.
    """
    paragraphs = "".join(f"<p>{escape(text)}</p>" for text in foot if text)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<header><h1>{escape(title)}</h1><p class="soft">{escape(lead)}</p></header>'
        f"{''.join(sections)}<footer>{paragraphs}</footer></main></body></html>"
    )


def section(title: str, note: str, body: str) -> str:
    """A heading, a line of plain text under it, and HTML; nothing at all without a body."""
    if not body:
        return ""
    note = f'<p class="soft">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{body}</section>"
