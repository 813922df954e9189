"""`vlm data score`: scores of every layout, resuming, and filters that read them."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

import vlm
from vlm.cli import main
from vlm.config import DataConfig, FieldFilter, MixturePart
from vlm.data.pipeline import train_batches
from vlm.data.scores import read_about
from vlm.data.sources import open_source
from vlm.data.weighted_order import order_of
from vlm.errors import ConfigError, DataError
from vlm.training import clip_score
from vlm.training.clip_score import quantiles, score
from vlm.weights.vocabularies import clip_tokenizer

CLIP = str(Path(__file__).parents[1] / "weights" / "golden" / "hf_clip")


@pytest.fixture(scope="module")
def model():
    return vlm.load(CLIP)


@pytest.fixture(scope="module")
def pairs(drawings) -> list[tuple[str, bytes, str]]:
    """Name, image and caption of the training drawings."""
    rows = map(json.loads, Path(drawings, "captions.jsonl").read_text().splitlines())
    return [
        (row["image"], Path(drawings, row["image"]).read_bytes(), row["caption"])
        for row in rows
        if row["split"] == "train"
    ]


@pytest.fixture(scope="module")
def expected(pairs, model) -> dict[str, float]:
    """The score of each caption, by the model's own methods."""
    images = model.encode_image([data for _, data, _ in pairs])
    texts = model.encode_text([caption for *_, caption in pairs])
    return dict(zip([c for *_, c in pairs], (images * texts).sum(1).tolist(), strict=True))


def write_tars(folder: Path, pairs, shards: int = 3) -> str:
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as tar:
            for name, image, caption in pairs[shard::shards]:
                for suffix, data in (("png", image), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{name.partition('.')[0]}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder / "{00..02}.tar")


def write_parquet(folder: Path, pairs) -> str:
    folder.mkdir(exist_ok=True)
    for part in range(2):
        rows = pairs[part::2]
        columns = {"image": [r[1] for r in rows], "caption": [r[2] for r in rows]}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{part}.parquet")
    return str(folder / "*.parquet")


def write_folder(folder: Path, pairs) -> str:
    folder.mkdir(exist_ok=True)
    for name, image, caption in pairs:
        (folder / name).write_bytes(image)
        (folder / name).with_suffix(".txt").write_text(caption)
    return str(folder)


def write_csv(folder: Path, pairs) -> str:
    folder.mkdir(exist_ok=True)
    for name, image, _ in pairs:
        (folder / name).write_bytes(image)
    lines = [f"{name},{caption}" for name, _, caption in pairs]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *lines]) + "\n")
    return str(folder / "captions.csv")


LAYOUTS = {"tar": write_tars, "parquet": write_parquet, "folder": write_folder, "csv": write_csv}


def scores_of(folder: Path) -> dict[str, float | None]:
    found = {}
    for file in sorted(folder.glob("*.parquet")):
        table = pyarrow.parquet.read_table(file)
        found |= dict(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
    return found


def captions_of(config: DataConfig) -> list[str]:
    """The captions that training reads, in their order."""
    preprocess, tokenizer = vlm.load(CLIP).preprocess, clip_tokenizer(77)
    batches = train_batches(config, preprocess, tokenizer, batch_size=4, seed=0)
    with contextlib.closing(batches):
        return [t for _ in range(6) for t in tokenizer.decode(next(batches)["tokens"])]


@pytest.mark.slow
@pytest.mark.parametrize("access", ["random", "stream"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_reads_the_best_pairs_of_every_layout(layout, access, pairs, expected, tmp_path):
    """Also after the data has moved, and written without a filter or with one."""
    source = LAYOUTS[layout](tmp_path / "data", pairs)
    if layout in ("folder", "csv") and access == "stream":
        pytest.skip("no stream of files")
    config = DataConfig(source, eval_split=None, access=access)
    out = str(tmp_path / "scores")
    about = score(config, "train", out, CLIP, batch_size=16)
    assert (about["scored"], about["unscored"]) == (40, 0)
    found = scores_of(tmp_path / "scores")
    values = sorted(value for value in found.values() if value is not None)
    np.testing.assert_allclose(values, sorted(expected.values()), atol=1e-6)
    assert len(found) == 40
    assert not any(str(tmp_path) in key for key in found)

    (least,) = quantiles(out, [0.25])
    best = sorted(expected, key=lambda text: expected[text])[-10:]
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "data", moved)
    filters = (FieldFilter("clip_score", at_least=least),)
    changes = {"source": source.replace(str(tmp_path / "data"), str(moved)), "scores": out}
    config = dataclasses.replace(config, **changes, filters=filters)
    assert set(captions_of(config)) == set(best)
    if access == "random":
        assert len(open_source(config, "train")) == 10
    if access == "stream":
        part = MixturePart(config.source, access=access, scores=out, filters=filters)
        assert set(captions_of(DataConfig(eval_split=None, mixture=(part,)))) == set(best)


@pytest.mark.slow
def test_a_score_can_be_the_weight_of_a_pair(pairs, expected, tmp_path):
    source = write_csv(tmp_path / "data", pairs)
    config = DataConfig(source, eval_split=None)
    out = str(tmp_path / "scores")
    score(config, "train", out, CLIP, batch_size=16)
    weighted = dataclasses.replace(config, scores=out, weight_column="clip_score")
    if min(expected.values()) < 0:  # random weights of the model
        with pytest.raises(DataError, match="number of at least 0"):
            order_of(open_source(weighted, "train"), weighted)
    filters = (FieldFilter("clip_score", at_least=0),)
    weighted = dataclasses.replace(weighted, filters=filters)
    kept = open_source(weighted, "train")
    found = order_of(kept, weighted).weights
    wanted = [expected[kept[i]["caption"]] for i in range(len(kept))]
    assert len(kept) > 0
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.slow
def test_bad_images_are_counted_and_have_no_score(pairs, tmp_path):
    broken = [(name, b"no image" if n < 3 else data, c) for n, (name, data, c) in enumerate(pairs)]
    source = write_tars(tmp_path / "data", broken)
    out = str(tmp_path / "scores")
    about = score(DataConfig(source, eval_split=None), "train", out, CLIP)
    assert (about["scored"], about["unscored"]) == (37, 3)
    assert list(scores_of(tmp_path / "scores").values()).count(None) == 3
    filters = (FieldFilter("clip_score", at_least=-1.0),)
    config = DataConfig(source, eval_split=None, scores=out, filters=filters)
    assert len(open_source(config, "train")) == 37


@pytest.mark.slow
def test_several_captions_have_a_mean_a_maximum_or_the_first(pairs, model, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    image = pairs[0][1]
    (folder / "a.png").write_bytes(image)
    texts = ["a red bar", "a dog", "the sea at night"]
    (folder / "captions.jsonl").write_text(json.dumps({"image": "a.png", "caption": texts}) + "\n")
    cosines = model.encode_text(texts) @ model.encode_image([image])[0]
    config = DataConfig(str(folder), eval_split=None)
    wanted: dict[clip_score.Reduce, float]
    wanted = {"mean": cosines.mean(), "max": cosines.max(), "first": cosines[0]}
    for reduce, value in wanted.items():
        about = score(config, "train", str(tmp_path / reduce), CLIP, reduce=reduce, batch_size=2)
        assert about["mean"] == pytest.approx(value, abs=1e-6)


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_scores(pairs, tmp_path, monkeypatch):
    """Killed by SIGKILL after some parts; the finished ones are not written again."""
    source = write_tars(tmp_path / "data", pairs)
    code = (
        "import sys, time; from vlm.config import DataConfig; from vlm.training import clip_score;"
        "clip_score.PART = 8; clip_score.score(DataConfig(sys.argv[1], eval_split=None), 'train', "
        "sys.argv[2], sys.argv[3], progress=lambda done, total: time.sleep(2 * (done == 2)))"
    )
    out = tmp_path / "killed"
    command = [sys.executable, "-c", code, source, str(out), CLIP]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not (out / "part-00001.parquet").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    first = (out / "part-00000.parquet").stat().st_mtime_ns
    with pytest.raises(DataError, match="is incomplete: run the same vlm data score again"):
        read_about(str(out))
    monkeypatch.setattr(clip_score, "PART", 8)
    config, done = DataConfig(source, eval_split=None), []
    score(config, "train", str(out), CLIP, progress=lambda *at: done.append(at))
    assert done[0][0] >= 2
    assert (out / "part-00000.parquet").stat().st_mtime_ns == first
    score(config, "train", str(tmp_path / "whole"), CLIP)
    files = {path.name for path in out.iterdir() if not path.name.startswith("tmp")}
    for name in sorted(files):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert score(config, "train", str(out), CLIP) == read_about(str(out))  # nothing is left to do


@pytest.mark.slow
def test_a_beam_pipeline_writes_the_same_scores(pairs, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam")
    monkeypatch.setattr(clip_score, "PART", 16)
    config = DataConfig(write_csv(tmp_path / "data", pairs), eval_split=None)
    here = score(config, "train", str(tmp_path / "here"), CLIP)
    options = ["runner=DirectRunner", "direct_running_mode=in_memory"]
    beam = score(config, "train", str(tmp_path / "beam"), CLIP, beam=options)
    assert here["digest"] == beam["digest"]


@pytest.mark.slow
def test_scores_of_other_data_are_refused(pairs, tmp_path):
    source, out = write_csv(tmp_path / "data", pairs[:8]), str(tmp_path / "scores")
    config = DataConfig(source, eval_split=None)
    score(config, "train", out, CLIP)
    with pytest.raises(DataError, match="has scores with other reduce: use the same settings"):
        score(config, "train", out, CLIP, reduce="max")
    filters = (FieldFilter("clip_score", at_least=0.0),)
    more = write_csv(tmp_path / "more", pairs[:9])
    config = dataclasses.replace(config, source=more, scores=out, filters=filters)
    with pytest.raises(DataError, match=r"scores has no score of line 10 of .*: run vlm data"):
        open_source(config, "train")


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"source": "python:m:d"}, {}, ConfigError, "is a data set in Python"),
        ({"mixture": (MixturePart("a.csv"),)}, {}, ConfigError, "a mixture has several sources"),
        ({"source": "a.csv"}, {"batch_size": 0}, ConfigError, "batch_size 0 is too small"),
    ],
)
def test_what_cannot_be_scored_is_refused(changes, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        score(DataConfig(**changes, eval_split=None), "train", str(tmp_path), CLIP, **options)


def test_scores_without_a_filter_and_without_files_are_refused(pairs, tmp_path):
    with pytest.raises(ConfigError, match="and no filter reads it: add FieldFilter"):
        DataConfig("a.csv", scores="scores/")
    source = write_csv(tmp_path / "data", pairs[:2])
    filters = (FieldFilter("clip_score", at_least=0.0),)
    with pytest.raises(DataError, match=r"has no scores\.json .*: write it with vlm data score"):
        open_source(DataConfig(source, scores=str(tmp_path / "no"), filters=filters), "train")
    with pytest.raises(ConfigError, match="a share of 0 is invalid"):
        quantiles(str(tmp_path), [0.0])


@pytest.mark.slow
def test_preparing_keeps_the_best_pairs(pairs, expected, tmp_path):
    source, out = write_tars(tmp_path / "data", pairs), str(tmp_path / "scores")
    score(DataConfig(source, eval_split=None), "train", out, CLIP)
    (least,) = quantiles(out, [0.25])
    shards = str(tmp_path / "best")
    condition = f"clip_score>={least!r}"
    assert main(["data", "prepare", source, shards, "--scores", out, "--filters", condition]) == 0
    kept = open_source(DataConfig(f"{shards}/*.tar", eval_split=None), "train")
    best = sorted(expected, key=lambda text: expected[text])[-10:]
    assert sorted(kept[i]["caption"] for i in range(len(kept))) == sorted(best)
