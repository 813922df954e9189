"""Bad input in a real stream: survived, counted, named; the order of the good samples unchanged."""

import collections
import dataclasses
import io
import itertools
import json
import tarfile

import kinds
import numpy as np
import pytest
from image_bombs import scan_bomb, tiff_of_one_tile
from kinds import PREPROCESS, TOKENIZER, jpeg, members, numbers_of, write_tar
from PIL import Image

from vlm.config import DataConfig
from vlm.data import storage
from vlm.data.pipeline import train_batches
from vlm.errors import DataError

SHARDS, EACH = 8, 12
FIELDS = DataConfig("", eval_split=None, prefetch=0)


def picture(kind: str, mode: str = "RGB", **options) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(out, kind, **options)
    return out.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 60,000 x 60,000 pixels."""
    data = bytearray(picture("PNG"))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    return bytes(data)


# What stands for one example: (its members by extension, the kind of fault).
BAD = {
    "empty image": ({"jpg": b"", "txt": b"x"}, "broken image"),
    "text as image": ({"jpg": b"not an image", "txt": b"x"}, "broken image"),
    "html as image": ({"jpg": b"<html>404</html>", "txt": b"x"}, "broken image"),
    "zeros as image": ({"jpg": bytes(500), "txt": b"x"}, "broken image"),
    "half a png": ({"png": picture("PNG")[:2000], "txt": b"x"}, "broken image"),
    "png of header alone": ({"png": picture("PNG")[:40], "txt": b"x"}, "broken image"),
    "half a webp": ({"webp": picture("WEBP")[:60], "txt": b"x"}, "broken image"),
    "half a gif": ({"gif": picture("GIF", "P")[:30], "txt": b"x"}, "broken image"),
    "half a tiff": ({"tiff": picture("TIFF")[:100], "txt": b"x"}, "broken image"),
    "jpeg of header alone": ({"jpg": picture("JPEG")[:20], "txt": b"x"}, "broken image"),
    "too many pixels": ({"png": bomb(), "txt": b"x"}, "broken image"),
    "too many scans": ({"jpg": scan_bomb(100, 16, 16), "txt": b"x"}, "broken image"),
    "a vast tile": ({"tif": tiff_of_one_tile(5_000), "txt": b"x"}, "broken image"),
    "no image": ({"txt": b"alone"}, "no image"),
    "image of another name": ({"dat": b"x", "txt": b"alone"}, "no image"),
    "no text": ({"jpg": jpeg(0)}, "no caption"),
    "empty text": ({"jpg": jpeg(0), "txt": b""}, "no caption"),
    "blank text": ({"jpg": jpeg(0), "txt": b" \n\t "}, "no caption"),
    "null caption": ({"jpg": jpeg(0), "json": b'{"caption": null}'}, "no caption"),
    "number as caption": ({"jpg": jpeg(0), "json": b'{"caption": 7}'}, "no caption"),
    "object as caption": ({"jpg": jpeg(0), "json": b'{"caption": {"a": 1}}'}, "no caption"),
    "nulls as captions": ({"jpg": jpeg(0), "json": b'{"caption": [null, ""]}'}, "no caption"),
    "empty list": ({"jpg": jpeg(0), "json": b'{"caption": []}'}, "no caption"),
    "truncated json": ({"jpg": jpeg(0), "json": b'{"caption": "a'}, "broken text"),
    "json list": ({"jpg": jpeg(0), "json": b'["a"]'}, "broken text"),
    "json null": ({"jpg": jpeg(0), "json": b"null"}, "broken text"),
    "empty json": ({"jpg": jpeg(0), "json": b""}, "broken text"),
    "latin-1 text": ({"jpg": jpeg(0), "txt": "Käse".encode("latin-1")}, "broken text"),
    "latin-1 json": ({"jpg": jpeg(0), "json": '{"x": "ä"}'.encode("latin-1")}, "broken text"),
}


def good(folder, broken: bool) -> DataConfig:
    """Shards of good examples; with `broken`, every bad one among them and broken shards behind."""
    folder.mkdir()
    bad = iter(BAD.values())
    for shard in range(SHARDS):
        content = []
        for number in range(shard * EACH, (shard + 1) * EACH):
            if broken and number % 3 == 1 and (parts := next(bad, None)):
                content += [(f"bad{number}.{k}", v) for k, v in parts[0].items()]
            content += members(number)
        write_tar(folder / f"{shard}.tar", content)
    assert not broken or next(bad, None) is None
    return dataclasses.replace(
        FIELDS,
        source=str(folder / "*.tar"),
        access="stream",
        interleave=4,
        shuffle=1,
        max_bad_share=1.0,
    )


def batches_of(config, folder=None, **options):
    return train_batches(
        config, PREPROCESS, TOKENIZER, batch_size=8, seed=0, run_folder=folder, **options
    )


def take(iterator, count: int) -> None:
    for _ in range(count):
        next(iterator)


def test_every_kind_is_survived_counted_and_named_and_good_samples_keep_their_order(tmp_path):
    clean = batches_of(good(tmp_path / "clean", broken=False))
    expected = [numbers_of(batch) for batch in itertools.islice(clean, 12)]
    run = tmp_path / "run"
    dirty = batches_of(good(tmp_path / "dirty", broken=True), run)
    states, seen, rows = [], [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(dirty.get_state())))
        batch = next(dirty)
        assert len(batch["images"]) == 8
        seen.append(numbers_of(batch))
    dirty.close()
    clean.close()
    assert seen == expected
    rows = [json.loads(line) for line in (run / "bad-samples.jsonl").read_text().splitlines()]
    kinds_met = sorted(kind for _, kind in BAD.values())
    assert sorted(row["kind"] for row in rows)[: len(kinds_met)] == kinds_met[: len(rows)]
    assert dirty.bad.kinds.total() == len(rows) == len(BAD)
    assert all("dirty" in row["where"] and "bad" in row["where"] and row["why"] for row in rows)

    resumed = batches_of(good(tmp_path / "again", broken=True), run)
    resumed.set_state(states[5])
    assert [numbers_of(next(resumed)) for _ in range(7)] == expected[5:]
    resumed.close()
    again = [json.loads(line) for line in (run / "bad-samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in again] == [row["step"] for row in rows]
    assert resumed.get_state()["bad"] == dirty.get_state()["bad"]


def test_broken_shards_are_passed_over_and_named(tmp_path):
    config = good(tmp_path / "data", broken=False)
    whole = (tmp_path / "data" / "3.tar").read_bytes()
    (tmp_path / "data" / "3.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data" / "5.tar").write_bytes(b"garbage " * 500)
    write_tar(tmp_path / "data" / "6.tar", [])
    (tmp_path / "data" / "2.tar").unlink()
    config = dataclasses.replace(config, source=str(tmp_path / "data" / "{0..7}.tar"))
    iterator = batches_of(config, tmp_path / "run")
    seen = {n for batch in itertools.islice(iterator, 12) for n in numbers_of(batch)}
    iterator.close()
    lost = set(range(SHARDS * EACH)) - seen
    assert set(range(24, 36)) | set(range(60, 84)) <= lost
    assert {n for n in lost if n not in range(24, 36) and n not in range(60, 84)} <= set(
        range(36, 48)
    )
    assert set(iterator.bad.kinds) == {"broken shard", "missing shard", "empty shard"}
    named = (tmp_path / "run" / "bad-samples.jsonl").read_text()
    assert all(f"{n}.tar" in named for n in (2, 3, 5, 6))


def test_a_read_that_fails_for_a_moment_changes_nothing(tmp_path, monkeypatch):
    config = good(tmp_path / "data", broken=False)
    expected = [numbers_of(b) for b in itertools.islice(batches_of(config), 6)]
    monkeypatch.setattr(storage, "BACKOFF", 0.001)
    opened, reads = storage.open_file, collections.Counter()

    class Flaky:
        def __init__(self, path):
            self._path, self._file = path, opened(path)

        def read(self, count):
            reads[self._path] += 1
            if reads[self._path] % 3 == 1:
                raise OSError("connection reset")
            return self._file.read(min(count, 1500))

        def seek(self, place):
            return self._file.seek(place)

        def close(self):
            self._file.close()

    monkeypatch.setattr(storage, "open_file", Flaky)
    flaky = batches_of(config)
    assert [numbers_of(b) for b in itertools.islice(flaky, 6)] == expected
    assert reads.total() > 20
    assert not flaky.bad.kinds


def test_a_read_that_keeps_failing_gives_the_shard_up(tmp_path, monkeypatch):
    config = good(tmp_path / "data", broken=False)
    monkeypatch.setattr(storage, "BACKOFF", 0.0)
    opened = storage.open_file

    def refuse(path):
        if path.endswith("4.tar"):
            raise OSError("no route to host")
        return opened(path)

    monkeypatch.setattr(storage, "open_file", refuse)
    iterator = batches_of(config)
    seen = {n for batch in itertools.islice(iterator, 12) for n in numbers_of(batch)}
    assert seen == set(range(SHARDS * EACH)) - set(range(48, 60))
    assert set(iterator.bad.kinds) == {"failed read"}
    iterator.close()


def test_a_run_stops_when_nothing_good_comes(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.{k}", b"x") for i in range(400) for k in ("jpg", "txt")])
    config = dataclasses.replace(FIELDS, access="stream", prefetch=2)
    config = dataclasses.replace(config, source=str(tmp_path / "a.tar"))
    iterator = batches_of(config)
    with pytest.raises(DataError, match=r"256 bad samples in a row, .*a\.tar: \d+"):
        next(iterator)
    iterator.close()


def test_a_run_stops_past_the_share(tmp_path):
    content = [m for n in range(400) for m in members(n)]
    content = [(name, b"x" if n % 7 == 0 else data) for n, (name, data) in enumerate(content)]
    write_tar(tmp_path / "a.tar", content)
    config = dataclasses.replace(FIELDS, access="stream", max_bad_share=0.1)
    iterator = batches_of(dataclasses.replace(config, source=str(tmp_path / "a.tar")))
    with pytest.raises(DataError, match=r"1\d\d of [\d,]+ samples are bad .*more than the 10.0%"):
        take(iterator, 200)
    seen = iterator.bad.seen
    iterator.close()
    resumed = batches_of(dataclasses.replace(config, source=str(tmp_path / "a.tar")))
    take(resumed, 20)
    fresh = batches_of(dataclasses.replace(config, source=str(tmp_path / "a.tar")))
    fresh.set_state(resumed.get_state())
    with pytest.raises(DataError, match=f"of {seen:,} samples"):
        take(fresh, 200)


def test_random_access_puts_another_example_in_the_place_of_a_bad_one(tmp_path):
    (tmp_path / "data").mkdir()
    clean = dataclasses.replace(kinds.csv(tmp_path / "data"), eval_split=None, prefetch=0)
    expected = [numbers_of(b) for b in itertools.islice(batches_of(clean), 10)]
    (tmp_path / "data" / "007.jpg").write_bytes(b"broken")
    (tmp_path / "data" / "011.jpg").unlink()
    iterator = batches_of(dataclasses.replace(clean, max_bad_share=1.0), tmp_path / "run")
    for numbers in expected:
        now = numbers_of(next(iterator))
        assert [a for a, b in zip(now, numbers, strict=True) if b not in (7, 11)] == [
            b for b in numbers if b not in (7, 11)
        ]
        assert not {7, 11} & set(now)
    assert {"broken image", "missing image"} == set(iterator.bad.kinds)
    named = (tmp_path / "run" / "bad-samples.jsonl").read_text()
    assert "007.jpg" in named
    assert "011.jpg" in named


@pytest.mark.parametrize("before", [0, 2])  # steps that a checkpoint had when the run was killed
def test_a_resumed_run_names_each_bad_sample_once(tmp_path, before):
    (tmp_path / "data").mkdir()
    source = kinds.tars(tmp_path / "data")
    (tmp_path / "data" / "001.tar").unlink()  # which is known before the first step
    content = [(f"{n:06d}.jpg", b"x") for n in range(8)]
    write_tar(tmp_path / "data" / "002.tar", content)
    config = dataclasses.replace(FIELDS, source=source, max_bad_share=1.0)

    def named() -> list[str]:
        return (tmp_path / "run" / "bad-samples.jsonl").read_text().splitlines()

    killed = batches_of(config, tmp_path / "run")
    take(killed, before)
    state = json.loads(json.dumps(killed.get_state()))
    take(killed, 4 - before)
    killed.close()
    expected = named()
    assert {json.loads(row)["kind"] for row in expected} == {"missing shard", "no caption"}
    resumed = batches_of(config, tmp_path / "run")
    if before:
        resumed.set_state(state)
    take(resumed, 4 - before)
    resumed.close()
    assert named() == expected


@pytest.mark.parametrize("kind", ["csv", "tar, streamed"])
def test_texts_that_lose_their_tail_are_counted_and_not_bad(kind, tmp_path):
    config = kinds.make(kind, tmp_path / "data")
    numbers = [n for b in itertools.islice(batches_of(config), 6) for n in numbers_of(b)]
    lengths = TOKENIZER.lengths([f"picture {n}" for n in numbers])
    context = min(lengths)
    assert max(lengths) > context
    short = TOKENIZER.with_rules(dataclasses.replace(TOKENIZER.config, context_length=context))
    first, second = (
        train_batches(config, PREPROCESS, short, batch_size=8, seed=0) for _ in range(2)
    )
    take(first, 3)
    second.set_state(json.loads(json.dumps(first.get_state())))
    take(second, 3)
    cut = sum(length > context for length in lengths)
    assert (first.bad.texts_cut, second.bad.texts_cut) == (
        sum(length > context for length in lengths[:24]),
        cut,
    )
    assert not second.bad.kinds
    assert second.bad.report().startswith(f"{cut} of 48 texts ({cut / 48:.1%}) were too long")
    for iterator in (first, second):
        iterator.close()


def refused(message: str, **changes):
    config = dataclasses.replace(FIELDS, **changes)
    with pytest.raises(DataError, match=message):
        batches_of(config)


def test_invalid_streams_raise_before_the_first_step(tmp_path):
    source = kinds.tars(tmp_path)
    stream = {"source": source, "access": "stream"}
    refused("6 shards, too few for 8 lanes", **stream, interleave=8)
    refused("no feature 'title' that data.captions names", **stream, captions=("caption", "title"))


def test_a_position_of_other_data_raises(tmp_path):
    config = dataclasses.replace(FIELDS, source=kinds.tars(tmp_path))
    stream = batches_of(dataclasses.replace(config, access="stream", interleave=2))
    next(stream)
    state = stream.get_state()
    fewer = dataclasses.replace(config, source=str(tmp_path / "{000..003}.tar"), access="stream")
    with pytest.raises(DataError, match="checkpoint is for other data"):
        batches_of(dataclasses.replace(fewer, interleave=2)).set_state(state)
    with pytest.raises(DataError, match=r"has 2 lanes and the run has 4: set data\.interleave"):
        batches_of(dataclasses.replace(config, access="stream", interleave=4)).set_state(state)
    with pytest.raises(DataError, match="checkpoint is for a stream"):
        batches_of(config).set_state(state)
    random = batches_of(config)
    next(random)
    with pytest.raises(DataError, match=r"other data \(45 examples, here 31\)"):
        batches_of(dataclasses.replace(fewer, access="random")).set_state(random.get_state())


def test_long_names_and_formats_of_tar(tmp_path):
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=form) as tar:
            folder = tarfile.TarInfo("part")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name, data in members(number):
                info = tarfile.TarInfo(f"part/{'ö' * 80}/{'x' * 90}/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    config = dataclasses.replace(
        FIELDS, source=str(tmp_path / "*.tar"), access="stream", interleave=2
    )
    assert set(numbers_of(next(batches_of(config)))) == {0, 1}
