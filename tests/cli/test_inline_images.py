"""Pictures in terminals: which protocol a terminal has, and what each one draws."""

import base64
import io
import os
import re

import numpy as np
import pytest
from PIL import Image

from vlm.cli import inline_images
from vlm.cli.inline_images import encoded, inline_image, protocol


@pytest.fixture
def terminal(monkeypatch):
    """Function that pretends that stdout is a terminal with these variables and attributes."""

    def pretend(attributes=(), tty=True, **variables):
        for name in ("KITTY_WINDOW_ID", "TERM_PROGRAM", "TERM", "TMUX"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.stdout.isatty", lambda: tty)
        monkeypatch.setattr(inline_images, "_device_attributes", lambda: list(attributes))
        protocol.cache_clear()

    yield pretend
    protocol.cache_clear()


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        ({}, None),
        ({"KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM_PROGRAM": "WezTerm"}, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"attributes": ("62", "4", "22")}, "sixel"),
        ({"attributes": ("64", "22", "14")}, None),
        ({"KITTY_WINDOW_ID": "1", "TMUX": "/tmp/x"}, None),  # tmux does not pass it on
        ({"KITTY_WINDOW_ID": "1", "TERM": "tmux-256color", "attributes": ("4",)}, "sixel"),
        ({"TERM": "dumb", "attributes": ("4",)}, None),
        ({"KITTY_WINDOW_ID": "1", "tty": False}, None),
    ],
)
def test_the_protocol_of_a_terminal(terminal, variables, kind):
    terminal(**variables)
    assert protocol() == kind
    drawn = inline_image(Image.new("RGB", (300, 200)))
    assert (drawn is None) == (kind is None)


def photo():
    rows = np.linspace(0, 255, 47 * 61 * 3).reshape(47, 61, 3)
    return Image.fromarray(rows.astype(np.uint8))


def test_pictures_of_kitty_and_iterm_are_png_files():
    kitty = encoded(photo(), "kitty")
    assert kitty.startswith("\033_Ga=T,f=100,q=2,m=")
    parts = re.findall(r"\033_G[^;]*m=(\d);([^\033]*)\033\\", kitty)
    assert [more for more, _ in parts] == ["1"] * (len(parts) - 1) + ["0"]
    assert all(len(text) <= 4096 for _, text in parts)
    iterm = re.fullmatch(r"\033\]1337;File=inline=1;size=(\d+):(.*)\a", encoded(photo(), "iterm"))
    files = [base64.b64decode("".join(text for _, text in parts)), base64.b64decode(iterm[2])]
    assert len(files[1]) == int(iterm[1])
    for file in files:
        assert np.array_equal(Image.open(io.BytesIO(file)), photo())


def decode_sixels(text):
    """An independent reader of sixels: palette and runs, to an array of RGB in percent."""
    head, body = re.fullmatch(r"\033Pq(\"1;1;\d+;\d+)(.*)\033\\", text, re.DOTALL).groups()
    width, height = map(int, head.split(";")[2:])
    palette, pixels = {}, np.full((-(-height // 6) * 6, width, 3), -1)
    x = y = colour = 0
    for token in re.findall(r"#\d+(?:;2;\d+;\d+;\d+)?|!\d+.|[$-]|[?-~]", body):
        if token.startswith("#"):
            colour, *rgb = map(int, token[1:].split(";"))
            if rgb:
                palette[colour] = rgb[1:]
        elif token == "$":
            x = 0
        elif token == "-":
            x, y = 0, y + 6
        else:
            run = int(token[1:-1]) if token.startswith("!") else 1
            for row in range(6):
                if (ord(token[-1]) - 63) >> row & 1:
                    pixels[y + row, x : x + run] = palette[colour]
            x += run
    assert (pixels[height:] == -1).all()
    return pixels[:height]


@pytest.mark.parametrize("size", [(1, 1), (7, 6), (61, 47)])
def test_sixels_are_the_picture(size):
    picture = photo().resize(size)
    shown = decode_sixels(encoded(picture, "sixel"))
    quantized = np.asarray(picture.quantize(255).convert("RGB"))
    assert np.abs(shown - quantized / 2.55).max() <= 0.51
    flat = Image.new("RGB", size, (255, 0, 51))
    assert (decode_sixels(encoded(flat, "sixel")) == (100, 0, 20)).all()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
@pytest.mark.parametrize("answer", [b"\033[?62;4;22c", b"", b"garbage"])
def test_a_terminal_is_asked(monkeypatch, answer):
    ours, theirs = os.openpty()
    opened = os.open
    monkeypatch.setattr(inline_images, "ANSWER_TIMEOUT", 0.05)
    monkeypatch.setattr(
        "os.open", lambda path, *flags: theirs if path == "/dev/tty" else opened(path, *flags)
    )
    monkeypatch.setattr("os.tcgetpgrp", lambda terminal: os.getpgrp())  # in the foreground
    os.write(ours, answer)
    found = inline_images._device_attributes()
    asked = b""
    while not asked.endswith(b"\033[c"):  # after the echo of the answer
        asked += os.read(ours, 100)
    assert found == (["62", "4", "22"] if b"62" in answer else [])
    os.close(ours)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_in_the_background_no_terminal_is_asked(monkeypatch):
    ours, theirs = os.openpty()
    monkeypatch.setattr("os.open", lambda path, *flags: theirs)
    monkeypatch.setattr("os.tcgetpgrp", lambda terminal: os.getpgrp() + 1)
    monkeypatch.setattr("os.write", lambda *args: pytest.fail("the terminal is asked"))
    assert inline_images._device_attributes() == []
    os.close(ours)
