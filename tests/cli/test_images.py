"""Folders with broken pictures in them: each is named, the others are worked on, the end fails."""

import dataclasses
import io
import json
import os
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image

import vlm
from vlm.cli import main
from vlm.cli.commands import UsageError
from vlm.cli.index import recorded_frames
from vlm.cli.search import search

BROKEN = ("empty.png", "half.png", "page.jpg", "gone.png")
GOOD = ("a.png", "café 象 🦄.png", "one.gif", "thin.png", "z.png")


@pytest.fixture(scope="module")
def run():
    return str(tiny.run())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder as people have them: five pictures, four files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    whole = (tiny.folder() / "data" / "test-red-square.png").read_bytes()
    for name in ("a.png", "café 象 🦄.png", "z.png"):
        (folder / name).write_bytes(whole)
    Image.new("RGB", (1, 1), (200, 0, 0)).save(folder / "one.gif")
    Image.new("RGB", (1, 30_000), (200, 0, 0)).save(folder / "thin.png")
    (folder / "empty.png").touch()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>404</body></html>")
    (folder / "gone.png").symlink_to(folder / "was-here.png")
    (folder / "notes.txt").write_text("not asked for")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep indexes of folders out of the user's cache."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache-of-vlm"))


@pytest.fixture
def fails(capsys):
    """Run a command that ends with exit code 1: what it printed, and its sentences on stderr."""

    def fails(*args):
        assert main([str(arg) for arg in args]) == 1
        out, err = capsys.readouterr()
        return out, [line for line in err.splitlines() if line.startswith("vlm: ")]

    return fails


def names_of(output, folder):
    """The broken files that the sentences name, and the last sentence, which counts them."""
    skipped, *each, last = output
    assert f"skipped 1 file in {folder} that are no images: 1 of .txt" in skipped
    assert len(each) == len(BROKEN)
    for name in BROKEN:
        assert sum(f"{folder / name}" in line for line in each) == 1
    assert "4 of 9 images could not be read and were left out" in last


def test_classify_goes_on(fails, run, photos):
    out, output = fails("classify", "--model", run, photos, "--labels", "red,blue", "--json")
    names_of(output, photos)
    assert [json.loads(line)["image"] for line in out.splitlines()] == [
        str(photos / name) for name in sorted(GOOD)
    ]
    alone = vlm.ZeroShotClassifier(vlm.load(run), ["red", "blue"], ["{}"])(photos / "a.png")
    shown = json.loads(out.splitlines()[0])["labels"][0]
    assert (shown["label"], shown["score"]) == (
        alone.top(1)[0][0][0],
        pytest.approx(alone.top(1)[0][0][1], abs=1e-5),
    )


def test_embed_goes_on(fails, run, photos, tmp_path):
    _, output = fails("embed", "--model", run, photos, tmp_path / "z.npz", "--batch-size", 2)
    names_of(output, photos)
    with np.load(tmp_path / "z.npz") as file:
        assert file["ids"].tolist() == [str(photos / name) for name in sorted(GOOD)]
        z = vlm.load(run).encode_image([photos / name for name in sorted(GOOD)])
        np.testing.assert_allclose(file["embeddings"], z, atol=2e-6)


def test_index_and_search_go_on(fails, run, photos, tmp_path, capsys):
    _, output = fails("index", "--model", run, photos, tmp_path / "index")
    names_of(output, photos)
    assert main(["search", str(tmp_path / "index"), str(photos / "a.png"), "--json"]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {os.path.basename(hit["id"]) for hit in hits} == set(GOOD)
    out, output = fails("search", photos, photos / "a.png", "--model", run, "--json")
    names_of(output, photos)
    assert {json.loads(line)["id"] for line in out.splitlines()} == {hit["id"] for hit in hits}


def test_nothing_that_can_be_read_writes_nothing(fails, run, photos, tmp_path):
    broken = [photos / name for name in ("empty.png", "half.png", "page.jpg")]
    for command, out in (("embed", tmp_path / "z.npz"), ("index", tmp_path / "index")):
        _, output = fails(command, "--model", run, *broken, out)
        assert "3 of 3 images could not be read" in output[-1]
        assert not out.exists()


def test_one_alone_is_one_sentence(fails, run, photos):
    for name, why in {
        "empty.png": "is empty",
        "half.png": "cannot be decoded",
        "page.jpg": "is a web page, not an image",
    }.items():
        _, (output,) = fails("classify", "--model", run, photos / name, "--labels", "red,blue")
        assert name in output
        assert why in output


def test_addresses_of_the_web_are_no_images(fails, run):
    url = "https://example.org/cat.jpg"
    _, (output,) = fails("classify", "--model", run, url, "--labels", "red,blue")
    assert f"{url} is a web address" in output
    assert "download it first" in output
    _, (*_, output) = fails(
        "classify", "--model", url, tiny.folder() / "data", "--labels", "red,blue"
    )
    assert f"{url} is a web address" in output


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_a_terminal_cannot_show(run, tmp_path, monkeypatch, encoding):
    image = os.path.join(os.fsencode(tmp_path), "café ".encode() + b"\xe9.png")  # and Latin-1
    shutil.copy(tiny.folder() / "data" / "test-red-square.png", image)
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding))
    assert main(["classify", "--model", run, str(tmp_path), "--labels", "red,blue"]) == 0
    first = shown.getvalue().splitlines()[0]
    assert first == (image if encoding == "utf-8" else os.fsencode(tmp_path) + b"/caf? ?.png")
    assert main(["index", "--model", run, str(tmp_path), str(tmp_path / "index")]) == 0
    assert main(["search", str(tmp_path / "index"), "red", "--json"]) == 0
    assert main(["embed", "--model", run, str(tmp_path), str(tmp_path / "z.safetensors")]) == 0


def test_a_video_is_searched_by_a_video(run, tmp_path, capsys):
    av = pytest.importorskip("av")
    colours = {"red": (200, 0, 0), "blue": (0, 0, 200)}
    for name, colour in colours.items():
        (tmp_path / "clips").mkdir(exist_ok=True)
        with av.open(str(tmp_path / "clips" / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
            for _ in range(4):
                frame = np.full((32, 32, 3), colour, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
    clips, index = str(tmp_path / "clips"), str(tmp_path / "index")
    assert main(["index", clips, index, "--video", "3", "--model", run]) == 0
    assert recorded_frames(tmp_path / "index") == 3
    red = str(tmp_path / "clips" / "red.mp4")
    capsys.readouterr()
    assert main(["search", index, red, "--json"]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert hits[0]["id"] == red
    assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
    z = vlm.load(run).encode_video([tmp_path / "clips" / f"{c}.mp4" for c in colours], frames=3)
    assert hits[1]["score"] == pytest.approx(float(z[0] @ z[1]), abs=1e-5)
    assert main(["search", index, red, "--json", "--minus", red, "--weight", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["id"] == red


def test_a_prompt_without_a_text_is_refused(photos):
    with pytest.raises(UsageError, match="--prompt is put before text queries"):
        search("index", str(photos / "a.png"), prompt="query")


def test_classify_and_eval_put_the_prompt_before_texts(run, photos, tmp_path, capsys):
    model = vlm.load(run)
    prompts = {"query": "a blue stripe "}
    rules = dataclasses.replace(model.tokenizer.config, prompts=prompts)
    model.tokenizer = model.tokenizer.with_rules(rules)
    model.save(tmp_path / "model")
    ask = ["classify", str(photos / "a.png"), "--labels", "red,blue", "--json", "--templates", "{}"]
    assert main([*ask, "--model", str(tmp_path / "model"), "--prompt", "query"]) == 0
    shown = json.loads(capsys.readouterr().out)["labels"]
    labels = ["a blue stripe red", "a blue stripe blue"]
    scores = dict(vlm.ZeroShotClassifier(model, labels, ["{}"])(photos / "a.png").top(2)[0])
    for pair in shown:
        score = scores[f"a blue stripe {pair['label']}"]
        assert pair["score"] == pytest.approx(score, abs=1e-5)
    assert main([*ask, "--model", str(tmp_path / "model"), "--prompt", "passage"]) == 1
    assert "prompt 'passage' is unknown: it has 'query'" in capsys.readouterr().err
    data = ["--data.source", str(photos), "--tasks", "zero-shot", "--data.label", "label"]
    assert main(["eval", str(tmp_path / "model"), *data, "--prompt", "passage"]) == 1
    assert "prompt 'passage' is unknown" in capsys.readouterr().err
