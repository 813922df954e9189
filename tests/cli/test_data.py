"""`vlm data`: what is shown, prepared and indexed of a small data set."""

import hashlib
import json
import os
import tarfile

import pytest
from PIL import Image

from vlm.cli import main
from vlm.config import DataConfig, PreprocessConfig
from vlm.data.prepare import Preparation
from vlm.data.prepare import prepare as write
from vlm.data.sources import open_source
from vlm.errors import DataError
from vlm.inputs.preprocess import Preprocess


@pytest.fixture
def photos(tmp_path):
    """Twelve photos with a text beside each: one twice, one broken, one tiny, one text too long."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        image = Image.effect_noise((90, 60), 60).convert("RGB") if i != 5 else None
        if image is None:
            image = Image.open(folder / "04.png")
        if i == 7:
            image = image.resize((9, 6))
        image.save(folder / f"{i:02d}.png")
        text = "very long " * 100 if i == 9 else f"photo {i}"
        (folder / f"{i:02d}.txt").write_text(text)
    (folder / "03.png").write_bytes(b"broken")
    return folder


def test_show_says_what_there_is(photos, tmp_path, capsys):
    page = tmp_path / "look.html"
    assert main(["data", "show", str(photos), "--json", "--out", str(page)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["looked_at"] == 12
    assert figures["good"] == 11
    assert figures["bad"] == {"broken image": 1}
    assert figures["duplicates"] == 1
    assert figures["captions_too_long"] == 1
    assert figures["width"] == {"min": 9, "median": 90, "p95": 90, "max": 90}
    assert figures["features"]["caption"] == "list"
    text = page.read_text()
    assert text.count("data:image/jpeg") == 11
    assert "photo 11" in text
    assert "03.png" in text
    assert main(["data", "show", str(photos), "--limit", "3"]) == 0
    assert "3 examples, 3 good" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["tar", "array_record"])
def test_prepared_data_reads_back(photos, tmp_path, capsys, form):
    out = tmp_path / "out"
    line = ["data", "prepare", str(photos), str(out), "--format", form, "--examples", "4"]
    line += ["--deduplicate", "--min-side", "20", "--short-side", "32"]
    assert main(line) == 0
    output = capsys.readouterr().out
    assert output.startswith("9 examples in 3 shards")
    for kind in ("1 broken image", "1 duplicate", "1 too small"):
        assert kind in output
    suffix = "tar" if form == "tar" else "array_record"
    source = open_source(DataConfig(str(out / f"train-*.{suffix}"), eval_split=None), "train")
    assert len(source) == 9
    texts = [source[i]["caption"] for i in range(9)]
    texts = [text if isinstance(text, str) else text[0] for text in texts]
    assert texts[:4] == ["photo 0", "photo 1", "photo 2", "photo 4"]
    assert Preprocess(PreprocessConfig()).open(source[0]["image"]).size == (48, 32)
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line_of in lines:
        shard = (out / line_of["file"]).read_bytes()
        assert hashlib.sha256(shard).hexdigest() == line_of["sha256"]
    assert main(line) == 0  # nothing is left to do
    assert capsys.readouterr().out == output
    assert main([*line, "--quality", "50"]) == 1
    assert "prepared with other settings" in capsys.readouterr().err


def test_a_preparation_that_was_stopped_goes_on(photos, tmp_path):
    config = DataConfig(str(photos), eval_split=None)
    wanted = Preparation(examples=2, deduplicate=True)
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    class Stopped(Exception):
        pass

    def run(out):
        return write(config, "train", out, wanted, Preprocess(PreprocessConfig()))

    total = run(whole)
    replace, calls = os.replace, []

    def stop(source, target):
        calls.append(target)
        if len(calls) == 4:
            raise Stopped
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(Stopped):
            run(cut)
    (cut / "manifest.jsonl").open("a").write('{"shard": 3, "fi')  # and killed while it wrote
    assert run(cut) == total
    for path in whole.glob("*.tar"):
        assert names(path) == names(cut / path.name)
    assert len(list(cut.glob("*.tar"))) == len(list(whole.glob("*.tar")))


def names(path):
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]


def test_a_stream_is_prepared_and_filtered(photos, tmp_path, capsys):
    shards, out = tmp_path / "shards", tmp_path / "out"
    assert main(["data", "prepare", str(photos), str(shards), "--examples", "3"]) == 0
    capsys.readouterr()
    line = [
        "data",
        "prepare",
        str(shards / "train-*.tar"),
        str(out),
        "--filters",
        "caption=photo 2",
    ]
    assert main(line) == 0
    assert capsys.readouterr().out.startswith("1 examples in 1 shards")
    assert main([*line[:-1], "caption"]) == 2
    assert "is not a condition" in capsys.readouterr().err


def test_an_index_beside_the_shards_is_found_and_small(photos, tmp_path, capsys):
    shards = tmp_path / "shards"
    assert main(["data", "prepare", str(photos), str(shards), "--examples", "3"]) == 0
    capsys.readouterr()
    pattern = str(shards / "train-*.tar")
    assert main(["data", "index", pattern]) == 0
    output = capsys.readouterr().out
    assert ": 11 examples in 4 shards" in output
    (path,) = shards.glob("*.vlm-index")
    with open(path, "rb") as f:
        header = int.from_bytes(f.read(8), "little")
    assert path.stat().st_size - 8 - header == 8 * (11 + 4)
    config = DataConfig(pattern, eval_split=None)
    assert len(open_source(config, "train")) == 11
    assert main(["data", "show", pattern, "--limit", "5"]) == 0
    with open(shards / "train-00000.tar", "ab") as f:
        f.write(bytes(512))
    with pytest.raises(DataError, match=r"train-00000\.tar has .* rebuild it"):
        open_source(config, "train")
    assert main(["data", "index", "photos/"]) == 2
