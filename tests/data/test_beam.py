"""A data set prepared on Beam's local runner: the bytes that one process writes."""

import dataclasses
from pathlib import Path

import kinds
import pytest

from vlm.config import DataConfig, FieldFilter, PreprocessConfig
from vlm.data import prepare as plain
from vlm.data.prepare import Preparation
from vlm.errors import ConfigError, DataError
from vlm.inputs.preprocess import Preprocess

pytest.importorskip("apache_beam", reason="needs the extra `beam`, which is not installed")

from vlm.data import beam

LOCAL = ("runner=FnApiRunner",)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def spoilt(folder: Path) -> Path:
    """A folder of pictures: two broken, some of them twice, and none good at its end."""
    folder.mkdir()
    kinds.beside(folder)
    for number in (7, 43, 44):
        (folder / f"{number:03d}.jpg").write_bytes(b"broken")
    for number in (9, 21, 40):
        (folder / f"{number:03d}.jpg").write_bytes((folder / "004.jpg").read_bytes())
    return folder


@pytest.mark.parametrize("form", ["tar", "array_record"])
@pytest.mark.parametrize("stream", [False, True])
def test_shards_from_beam_are_those_of_one_process(tmp_path, monkeypatch, form, stream):
    monkeypatch.setattr(beam, "CHUNK", 4)
    preprocess = Preprocess(PreprocessConfig())
    config = DataConfig(str(spoilt(tmp_path / "data")), eval_split=None)
    wanted = Preparation(form, examples=7, short_side=8, deduplicate=True)
    if stream:
        source = Preparation(examples=6)
        plain.prepare(config, "train", tmp_path / "shards", source, preprocess)
        config = dataclasses.replace(
            config,
            source=str(tmp_path / "shards" / "train-*.tar"),
            access="stream",
            filters=(FieldFilter("caption", one_of=tuple(f"picture {n}" for n in range(40))),),
        )
        wanted = dataclasses.replace(wanted, deduplicate=False)
    totals = plain.prepare(config, "train", tmp_path / "plain", wanted, preprocess)
    assert beam.prepare(config, "train", tmp_path / "beam", wanted, LOCAL) == totals
    assert files(tmp_path / "beam") == files(tmp_path / "plain")
    assert len(list((tmp_path / "beam").glob("train-*"))) > 4
    assert totals["left_out"] == (
        {"filtered": 3} if stream else {"broken image": 3, "duplicate": 3}
    )
    with pytest.raises(DataError, match="has shards already: go on without --beam"):
        beam.prepare(config, "train", tmp_path / "beam", wanted, LOCAL)


@pytest.mark.parametrize("against", [False, True])
def test_near_duplicates_on_beam_are_those_of_one_process(tmp_path, monkeypatch, against):
    monkeypatch.setattr(beam, "CHUNK", 4)
    preprocess = Preprocess(PreprocessConfig())
    config = DataConfig(str(spoilt(tmp_path / "data")), eval_split=None)
    wanted = Preparation(examples=7, near_duplicates=15, min_words=2, deduplicate=True)
    if against:
        (tmp_path / "evals").mkdir()
        for number in (0, 30):
            (tmp_path / "evals" / f"{number}.jpg").write_bytes(kinds.jpeg(number))
        wanted = dataclasses.replace(wanted, against=str(tmp_path / "evals"))
    totals = plain.prepare(config, "train", tmp_path / "plain", wanted, preprocess)
    assert beam.prepare(config, "train", tmp_path / "beam", wanted, LOCAL) == totals
    assert files(tmp_path / "beam") == files(tmp_path / "plain")
    assert totals["left_out"]["duplicate"] == 3
    assert totals["left_out"].get("in evaluation set", 0) >= 2 * against
    wanted = dataclasses.replace(wanted, max_similarity=0.9)
    with pytest.raises(ConfigError, match="not possible on Beam: go on without --beam"):
        beam.prepare(config, "train", tmp_path / "new", wanted, LOCAL)


def test_a_worker_that_fails_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("as runners pass it on:\nOSError: no space left on device")

    monkeypatch.setattr(beam.ShardWriter, "add", full)
    config = DataConfig(str(spoilt(tmp_path / "data")), eval_split=None)
    with pytest.raises(DataError, match=r"^a worker of .* \(.*no space left on device.*\)$"):
        beam.prepare(config, "train", tmp_path / "beam", Preparation(), LOCAL)


def test_options_that_are_none_are_one_sentence():
    with pytest.raises(ConfigError, match="--beam DirectRunner is not an option of Beam"):
        beam.pipeline(["DirectRunner"])
    with pytest.raises(ConfigError, match="Beam rejects --beam runner=Fast"):
        beam.pipeline(["runner=Fast"])
    with pytest.raises(ConfigError, match=r"\(.*invalid int value: 'two'\)$"):
        beam.pipeline([*LOCAL, "direct_num_workers=two"])
