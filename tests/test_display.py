"""Results render in notebooks and terminals."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import vlm
from vlm import display

GOLDEN = pathlib.Path(__file__).parent / "weights" / "golden"


@pytest.fixture(scope="module")
def model():
    return vlm.load(GOLDEN / "oc_vit")


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    """One object of each kind that renders itself."""
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{colour}.png" for colour in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (40, 30), path.stem).save(path)
    classify = vlm.ZeroShotClassifier(model, ["a <dog>", "a cat"])
    index = vlm.RetrievalIndex(model)
    index.add(paths)
    shots = vlm.FewShotClassifier.fit(model, paths, ["a <dog>", "a cat"])
    return {
        "bundle": model,
        "classifier": classify,
        "classification": classify(paths),
        "few shots": shots,
        "index": index,
        "hits": index.search("a dog", k=2),
    }


KINDS = ("bundle", "classifier", "classification", "few shots", "index", "hits")


@pytest.mark.parametrize("kind", KINDS)
def test_a_notebook_shows_it(results, kind):
    page = results[kind]._repr_html_()
    assert page.startswith("<")
    assert "<dog>" not in page
    if kind in ("classification", "index", "hits"):
        assert page.count("<img") == 2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "index"])
def test_a_terminal_shows_it(results, kind):
    out = io.StringIO()
    Console(file=out, width=80).print(results[kind])
    text = out.getvalue()
    assert "object at 0x" not in text
    words = {"bundle": "oc_vit", "classifier": "<dog>", "few shots": "<dog>"}
    assert words.get(kind, "█" if kind == "classification" else "png") in text


def test_a_plan_renders_in_both():
    from vlm.planning.prediction import plan

    found = plan(vlm.load_config("openmoji"), "v5e:2x2", "data=4", compiled=False)
    out = io.StringIO()
    Console(file=out, width=100).print(found)
    assert "memory of one device" in out.getvalue()
    assert "memory of one device" in found._repr_html_()
    assert found._repr_html_().startswith("<pre")


def test_bars_are_as_long_as_their_scores():
    assert [len(display.bar(share)) for share in (0, 0.5, 1, 2)] == [0, 10, 20, 20]
    assert "width:50.0%" in display.bars([("a", 1.0)], 2.0)
    assert "&lt;b&gt;" in display.bars([("<b>", 1.0)])


def test_an_image_that_cannot_be_read_is_left_out(tmp_path):
    assert display.thumbnail(tmp_path / "nothing.png") == ""


def test_display_keeps_the_image_of_the_user():
    image = Image.new("RGB", (300, 200), "red")
    display.data_uri(image, 96)
    vlm.explanation.embedding_map(np.eye(2, dtype=np.float32), [image, image]).picture()
    assert image.size == (300, 200)


def bars(tmp_path, terminal):
    """What a process shows that encodes with a progress bar, in a terminal or a pipe."""
    import os
    import pty
    import subprocess
    import sys

    program = "import test_display; test_display.encode_with_progress()"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
    if not terminal:
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stderr.decode()
    parent, child = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", program], env=env, stderr=child) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                part = os.read(parent, 4096)
            except OSError:  # the end, on Linux
                break
            if not part:
                break
            shown += part
    assert process.returncode == 0
    os.close(parent)
    return shown.decode()


def encode_with_progress():
    from test_pickle import PICTURES, TEXTS, bundle

    model = bundle()
    model.encode_image(PICTURES, 2, progress=True)
    model.encode_text(iter(TEXTS), progress=True)


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_is_shown_in_terminals(terminal, tmp_path):
    shown = bars(tmp_path, terminal)
    assert ("encode images" in shown and "3/3" in shown) == terminal
    assert ("encode texts" in shown and "2/?" in shown) == terminal


def test_progress_changes_no_embedding(monkeypatch):
    """Lists, iterators and images that fail; in a notebook, the display is updated in place."""
    from test_pickle import PICTURES, TEXTS, bundle

    model, pages = bundle(), []

    class Handle:
        def update(self, page):
            pages.append(page.data)

    def shown(page, display_id):
        assert display_id
        pages.append(page.data)
        return Handle()

    monkeypatch.setattr(display, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", shown)
    failed = []
    images = [*PICTURES, b"not an image"]
    options = {"on_error": lambda position, error: failed.append(position), "progress": True}
    np.testing.assert_array_equal(
        model.encode_image(images, 2, **options), model.encode_image(PICTURES, 2)
    )
    assert failed == [3]
    assert pages[0] == 'encode images <progress value="0" max="4"></progress> 0 of 4, 0.0/s'
    assert "3 of 4" in pages[-1]
    pages.clear()
    np.testing.assert_array_equal(
        model.encode_text(iter(TEXTS), 1, progress=True), model.encode_text(TEXTS, 1)
    )
    assert "<progress></progress> 2, " in pages[-1]
    pages.clear()
    assert model.encode_text([], progress=True).shape == (0, model.embed_dim)
    assert model.encode_text("one", progress=True).shape == (1, model.embed_dim)
