"""Duplicates that `vlm data prepare` finds: by hash and by embedding, the first one kept."""

import io
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from vlm.bundle import Bundle
from vlm.config import DataConfig, ModelConfig, PreprocessConfig, TextConfig, ViTConfig
from vlm.data.near_duplicates import HashIndex, perceptual_hash
from vlm.data.prepare import prepare
from vlm.data.prepare_example import Preparation
from vlm.data.sources import open_source
from vlm.errors import ConfigError, DataError
from vlm.heads.similar_images import ImageEmbedder, SimilarityIndex
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import train_bpe
from vlm.models.dual_encoder import DualEncoder

PREPROCESS = Preprocess(PreprocessConfig(image_size=16))
# phash of the library imagehash 4.3.2, of `waves(seed, ...)`.
IMAGEHASH = {
    (200, 150): ["d7e182e187e187e1", "d1ab51abfea87202", "c60cb8ea5075fe54", "fdeb4045ee408a1f"],
    (640, 480): ["d7e182e183e1c7e1", "d1ab51abfaac7802", "c60cb8ea5075fe54", "fdeb6045ee408a1d"],
}
COPIES = {5: 1, 8: 1, 13: 4, 17: 10}  # a copy, and its original
SHOWN = {3: 2, 11: 0}  # near an image of the evaluation set
ALL = Preparation(
    examples=3,
    short_side=40,
    deduplicate=True,
    near_duplicates=6,
    max_similarity=0.999,
    min_side=20,
    max_aspect=4,
    min_words=2,
)


def waves(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pixels = np.zeros((height, width, 3))
    for c in range(3):
        for _ in range(6):
            a, b, phase = [*rng.uniform(0, 12, 2).tolist(), rng.uniform(0, 6)]
            pixels[..., c] += 20 * np.sin(2 * np.pi * (a * x / width + b * y / height) + phase)
    return Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8))


def copied(image: Image.Image, quality: int = 85) -> Image.Image:
    out = io.BytesIO()
    image.resize((image.width * 5 // 6, image.height * 5 // 6)).save(out, "JPEG", quality=quality)
    return Image.open(out)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twenty images with captions, some of them copies, bad, too small, or without words."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(20):
        image = copied(waves(COPIES[i])) if i in COPIES else waves(i)
        if i in SHOWN:
            image = copied(waves(100 + SHOWN[i]))
        if i == 6:
            image = image.resize((18, 12))
        if i == 7:
            image = image.resize((300, 30))
        image.save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text("word" if i == 9 else f"a wave {i}")
    (folder / "15.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "class"
    folder.mkdir()
    for i in range(3):
        waves(100 + i).save(folder / f"{i}.png")
    return folder.parent


def embedder(least: float = 0.999) -> ImageEmbedder:
    thin = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 16, "projection": "linear"}
    config = ModelConfig(
        vision=ViTConfig(image_size=16, patch_size=4, pool="mean", **thin),
        text=TextConfig(vocab_size=300, context_length=8, pad_id=0, pool="mean", **thin),
        embed_dim=32,
    )
    tokenizer = train_bpe([f"a wave {i}" for i in range(60)], 280, 8)
    model = DualEncoder(config, rngs=nnx.Rngs(0))
    model = Bundle(model, PREPROCESS, tokenizer, "thin")
    return ImageEmbedder(model, least, batch_size=4)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(data: Path, out: Path, wanted: Preparation, embedder=None) -> dict:
    config = DataConfig(str(data), eval_split=None)
    return prepare(config, "train", out, wanted, PREPROCESS, embedder=embedder)


@pytest.mark.parametrize("size", IMAGEHASH)
def test_the_hash_is_that_of_imagehash(size):
    for seed, known in enumerate(IMAGEHASH[size]):
        bits = np.unpackbits(np.frombuffer(perceptual_hash(waves(seed, *size))[:8], np.uint8))
        known_bits = np.unpackbits(np.frombuffer(bytes.fromhex(known), np.uint8))
        reduced = min(size) >= 256
        assert (bits != known_bits).sum() <= (4 if reduced else 0)


@pytest.mark.parametrize("distance", [0, 3, 6, 15])
def test_all_hashes_within_the_distance_are_found(distance):
    rng = np.random.default_rng(distance)
    base = rng.integers(0, 256, (40, 8), np.uint8)
    index = HashIndex(distance)
    for row in base:
        index.add(row.tobytes() + b"\x80\x80\x80\0")
    for _ in range(300):
        bits = np.unpackbits(base[rng.integers(40)])
        bits[rng.choice(64, rng.integers(0, 20), replace=False)] ^= 1
        query = np.packbits(bits)
        near = (np.unpackbits(base ^ query, axis=1).sum(1) <= distance).any()
        assert index.has_near(query.tobytes() + b"\x90\x80\x70\0") == near
        assert not index.has_near(query.tobytes() + b"\xff\x80\x80\0")  # another colour


def test_embeddings_within_the_cosine_are_found():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 16))
    rows[150:] = rows[:150] + 0.3 * rows[150:]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows.astype(np.float16)
    index, kept = SimilarityIndex(16, 0.95), []
    for start in range(0, 300, 50):
        batch = rows[start : start + 50]
        index.expect([row.tobytes() for row in batch])
        for row in batch:
            near = any(float(row.astype(np.float32) @ other) >= 0.95 for other in kept)
            assert index.has_near(row.tobytes()) == near
            if not near:
                index.add(row.tobytes())
                kept.append(row.astype(np.float32))
    assert 150 < len(kept) < 300


def test_the_first_of_near_duplicates_stays_and_evaluation_images_go(data, evaluation, tmp_path):
    wanted = Preparation(near_duplicates=6, against=str(evaluation))
    totals = run(data, tmp_path / "out", wanted)
    assert totals["left_out"] == {"near duplicate": 4, "in evaluation set": 2, "broken image": 1}
    assert totals["examples"] == 13
    assert b'"near duplicate": 4' in (tmp_path / "out" / "totals.json").read_bytes()
    with pytest.raises(DataError, match="other settings"):
        run(data, tmp_path / "out", Preparation(near_duplicates=5, against=str(evaluation)))


@pytest.mark.slow
def test_every_filter_counts_and_a_stopped_run_ends_with_the_same_bytes(
    data, evaluation, tmp_path, monkeypatch
):
    from vlm.data import prepare as module

    wanted = ALL.__class__(**{**ALL.__dict__, "against": str(evaluation)})
    totals = run(data, tmp_path / "whole", wanted, embedder())
    assert totals["left_out"]["in evaluation set"] >= 2
    assert {"too small", "too long and narrow", "caption length", "broken image"} < set(
        totals["left_out"]
    )
    assert sum(totals["left_out"].values()) + totals["examples"] == 20
    whole = files(tmp_path / "whole")

    class Stopped(Exception):
        pass

    append = module.append_to_manifest
    for number in range(totals["shards"]):

        def stop(folder, lines, number=number):
            if lines[0]["shard"] == number:
                raise Stopped
            append(folder, lines)

        out = tmp_path / f"cut {number}"
        with monkeypatch.context() as patch:
            patch.setattr(module, "append_to_manifest", stop)
            with pytest.raises(Stopped):
                run(data, out, wanted, embedder())
        assert run(data, out, wanted, embedder()) == totals
        assert files(out) == whole


@pytest.mark.slow
def test_similar_images_are_found_by_the_model_alone(data, tmp_path):
    totals = run(data, tmp_path / "out", Preparation(max_similarity=0.999), embedder())
    assert 0 < totals["left_out"]["similar image"] < 15
    with pytest.raises(ConfigError, match="go together: set both"):
        run(data, tmp_path / "out", Preparation(max_similarity=0.9))


@pytest.mark.parametrize("kind", ["tars", "parquet_bytes", "csv", "arrow", "array_record"])
def test_an_evaluation_set_may_be_of_any_kind(tmp_path, kind):
    import kinds

    (tmp_path / "set").mkdir()
    made = getattr(kinds, kind)(tmp_path / "set")
    source = made if isinstance(made, str) else made.source
    folder = tmp_path / "data"
    folder.mkdir()
    for number in (3, 400, 7):
        (folder / f"{number}.jpg").write_bytes(kinds.jpeg(number))
        (folder / f"{number}.txt").write_text("a picture")
    wanted = Preparation(near_duplicates=2, against=source, against_split="train")
    totals = run(folder, tmp_path / "out", wanted)
    assert totals["left_out"] == {"in evaluation set": 2}


@pytest.mark.parametrize("kind", [np.asarray, lambda image: image], ids=["array", "image"])
def test_images_of_python_are_written_without_loss(tmp_path, kind):
    rows = [{"image": kind(waves(i)), "caption": f"a wave {i}"} for i in (0, 0, 1)]
    config = DataConfig(source=rows, eval_split=None)
    wanted = Preparation(near_duplicates=0)
    totals = prepare(config, "train", tmp_path / "out", wanted, PREPROCESS)
    assert (totals["examples"], totals["left_out"]) == (2, {"near duplicate": 1})
    source = open_source(
        DataConfig(str(tmp_path / "out" / "train-*.tar"), eval_split=None), "train"
    )
    stored = Image.open(io.BytesIO(source[1]["image"]))
    assert (np.asarray(stored) == np.asarray(waves(1))).all()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"near_duplicates": 40}, "near_duplicates 40 is no distance of hashes: give 0 to 15"),
        ({"against": "evals"}, "against 'evals' needs a comparison of images"),
        ({"max_aspect": 0.5}, "max_aspect 0.5 is below 1"),
        ({"min_words": -1}, "min_words -1 is negative"),
        ({"min_characters": 9, "max_characters": 3}, "max_characters 3 leaves no caption"),
        ({"language_model": "lid.bin"}, "language_model is set and languages are not"),
    ],
)
def test_settings_that_cannot_be_are_named(data, tmp_path, wanted, message):
    with pytest.raises(ConfigError, match=message):
        run(data, tmp_path / "out", Preparation(**wanted))
    assert not (tmp_path / "out").exists()


def test_a_broken_evaluation_set_is_named(data, tmp_path):
    (tmp_path / "evals").mkdir()
    wanted = Preparation(near_duplicates=2, against=str(tmp_path / "evals"))
    with pytest.raises(DataError):
        run(data, tmp_path / "out", wanted)
    (tmp_path / "evals" / "0.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"0\.png is not an image"):
        run(data, tmp_path / "out", wanted)
    waves(1).save(tmp_path / "evals" / "0.png")
    assert run(data, tmp_path / "out", wanted)["left_out"]["in evaluation set"] == 3


@pytest.mark.slow
def test_a_killed_preparation_ends_with_the_same_bytes(data, evaluation, tmp_path):
    wanted = ALL.__class__(
        **{**ALL.__dict__, "max_similarity": None, "against": str(evaluation), "examples": 2}
    )
    totals = run(data, tmp_path / "whole", wanted)
    script = textwrap.dedent(f"""
        import time
        from vlm.config import DataConfig, PreprocessConfig
        from vlm.data import prepare as module
        from vlm.data.prepare_example import Preparation
        from vlm.inputs.preprocess import Preprocess
        add = module.ShardWriter.add
        def slow(*args):
            time.sleep(0.05)
            add(*args)
        module.ShardWriter.add = slow
        config = DataConfig({str(data)!r}, eval_split=None)
        preprocess = Preprocess(PreprocessConfig(image_size=16))
        module.prepare(config, "train", {str(tmp_path / "cut")!r}, {wanted!r}, preprocess)
    """)
    lines = 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", script])
        manifest = tmp_path / "cut" / "manifest.jsonl"
        while process.poll() is None:
            if manifest.exists() and manifest.read_text().count("\n") > lines:
                lines = manifest.read_text().count("\n")
                process.kill()
            time.sleep(0.01)
    assert lines > 1
    assert run(data, tmp_path / "cut", wanted) == totals
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
