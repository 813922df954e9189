"""Pictures inside a terminal, by the protocols of kitty and iTerm2, or as sixels."""

import base64
import functools
import io
import os
import re
import select
import sys
import time
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlm.display import reduced

Protocol = Literal["kitty", "iterm", "sixel"]
ANSWER_TIMEOUT = 0.5  # seconds that a terminal has to answer a query
COLOURS = 255  # of a sixel picture


def inline_image(image: Any, size: int = 240) -> str | None:
    """Return the escape sequence that draws an image; None if stdout cannot draw it."""
    kind = protocol()
    return None if kind is None else encoded(reduced(image, size), kind)


@functools.cache
def protocol() -> Protocol | None:
    """Return the protocol of the terminal; None if stdout is not a terminal, or has none.

    kitty (also WezTerm and Ghostty) and iTerm2 are known by environment variables. Other terminals
    are asked whether they draw sixels, as are tmux and screen, which hide the outer terminal.
    """
    term, program = os.environ.get("TERM", ""), os.environ.get("TERM_PROGRAM", "")
    if not sys.stdout.isatty() or term in ("dumb", "linux"):
        return None
    if not ("TMUX" in os.environ or term.startswith(("screen", "tmux"))):
        if "KITTY_WINDOW_ID" in os.environ or "kitty" in term or program in ("ghostty", "WezTerm"):
            return "kitty"
        if program == "iTerm.app":
            return "iterm"
    return "sixel" if "4" in _device_attributes() else None


def encoded(picture: Image.Image, kind: Protocol) -> str:
    """Return the escape sequence that draws a picture by a protocol."""
    if kind == "sixel":
        return _sixels(picture)
    out = io.BytesIO()
    picture.save(out, "PNG")
    text = base64.b64encode(out.getvalue()).decode()
    if kind == "iterm":
        return f"\033]1337;File=inline=1;size={len(out.getvalue())}:{text}\a"
    chunks = [text[i : i + 4096] for i in range(0, len(text), 4096)]
    return "".join(
        f"\033_G{'a=T,f=100,q=2,' if i == 0 else ''}m={int(i + 1 < len(chunks))};{chunk}\033\\"
        for i, chunk in enumerate(chunks)
    )


def _sixels(picture: Image.Image) -> str:
    """Encode a picture as sixels: rows of 6 pixels, one line of each row for each colour."""
    indexed = picture.convert("RGB").quantize(COLOURS)
    pixels = np.asarray(indexed).astype(np.int16)
    height, width = pixels.shape
    palette = np.rint(np.reshape(indexed.getpalette() or [], (-1, 3)) * (100 / 255)).astype(int)
    parts = [f'\033Pq"1;1;{width};{height}']
    parts += [f"#{colour};2;{';'.join(map(str, rgb))}" for colour, rgb in enumerate(palette)]
    pixels = np.pad(pixels, ((0, -height % 6), (0, 0)), constant_values=-1)
    for top in range(0, len(pixels), 6):
        band = pixels[top : top + 6]
        for colour in np.unique(band[band >= 0]):
            bits = (1 << np.arange(6)) @ (band == colour)
            line = (63 + bits).astype(np.uint8).tobytes().decode("ascii")
            line = re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", line)
            parts.append(f"#{colour}{line}$")
        parts.append("-")
    return "".join(parts) + "\033\\"


def _device_attributes() -> list[str]:
    """Ask the terminal for its primary device attributes; empty if it does not answer."""
    try:
        import termios
        import tty

        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except (ImportError, OSError):  # Windows, or no controlling terminal
        return []
    answer, deadline = b"", time.monotonic() + ANSWER_TIMEOUT
    try:
        if os.tcgetpgrp(terminal) != os.getpgrp():
            return []  # in the background, where changing the terminal would stop the process
        before = termios.tcgetattr(terminal)
        try:
            tty.setcbreak(terminal, termios.TCSADRAIN)
            os.write(terminal, b"\033[c")
            while not answer.endswith(b"c") and (left := deadline - time.monotonic()) > 0:
                if select.select([terminal], [], [], left)[0]:
                    answer += os.read(terminal, 256)
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)
    except (termios.error, OSError):
        return []
    finally:
        os.close(terminal)
    found = re.search(rb"\033\[\?([\d;]+)c", answer)
    return found[1].decode().split(";") if found else []
