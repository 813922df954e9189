"""Draw the figures of the page on losses: `python tests/docs/figures.py` writes them again."""

from pathlib import Path

FOLDER = Path(__file__).parents[2] / "vlm" / "docs" / "concepts"
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")  # of text blocks
DEVICES, CELL, TILES = len(COLOURS), 64, 3
STYLE = (
    "<style>text{font:13px sans-serif;fill:#222;text-anchor:middle;dominant-baseline:central}"
    ".w{fill:#fff}</style>"
)


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    paper = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    return "\n".join([head, f"<title>{title}</title>", STYLE, paper, *parts, "</svg>", ""])


def rect(x: float, y: float, width: float, height: float, fill: str, opacity: float = 1) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" '
        f'fill-opacity="{opacity}" stroke="#222"/>'
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{style}>{words}</text>'


def ring() -> str:
    """Each row is a step; each column a device, with its images and the texts that visit it."""
    parts = [text(150 + 110 * k, 24, f"device {k}") for k in range(DEVICES)]
    for step in range(DEVICES):
        y = 48 + 72 * step
        parts.append(text(44, y + 20, f"step {step}"))
        for device in range(DEVICES):
            x, block = 105 + 110 * device, (device - step) % DEVICES
            parts += [rect(x, y, 40, 40, "#ddd"), text(x + 20, y + 20, f"I{device}")]
            parts += [
                rect(x + 50, y, 40, 40, COLOURS[block]),
                text(x + 70, y + 20, f"T{block}", "w"),
            ]
            if step < DEVICES - 1 and device < DEVICES - 1:
                parts.append(
                    f'<path d="M{x + 70} {y + 42} L{x + 176} {y + 70}" '
                    f'stroke="{COLOURS[block]}" stroke-width="2" fill="none"/>'
                )
    y = 48 + 72 * DEVICES
    parts.append(text(44, y + 12, "home"))
    parts += [text(150 + 110 * k, y + 12, f"sums of T{k}") for k in range(DEVICES)]
    return svg(540, y + 32, "Blocks of texts travel around a ring of four devices", parts)


def tiles() -> str:
    """The matrix of logits: a row for each device, a column for each block of texts."""
    parts = [text(70 + CELL * (j + 0.5), 16, f"T{j}") for j in range(DEVICES)]
    for device in range(DEVICES):
        y = 32 + CELL * device
        parts.append(text(40, y + CELL / 2, f"I{device}"))
        for block in range(DEVICES):
            x, step = 70 + CELL * block, (device - block) % DEVICES
            parts.append(rect(x, y, CELL, CELL, COLOURS[block], 0.9 if step == 0 else 0.35))
            parts.append(text(x + CELL / 2, y + CELL / 2, f"step {step}"))
    x, y, side = 70 + CELL * 3, 32, CELL / TILES
    for i in range(1, TILES):
        parts.append(
            f'<path d="M{x + i * side} {y} v{CELL} M{x} {y + i * side} h{CELL}" '
            'stroke="#222" stroke-width="0.6" stroke-dasharray="3 2"/>'
        )
    parts.append(
        text(70 + CELL * 2, 32 + CELL * DEVICES + 18, "dark: the matching pairs; dashed: tiles")
    )
    return svg(
        350, 32 + CELL * DEVICES + 36, "Logits of a global batch, in blocks and tiles", parts
    )


FIGURES = {"ring.svg": ring, "tiles.svg": tiles}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw())
