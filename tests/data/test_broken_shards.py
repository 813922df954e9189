"""Shards that are missing, cut or concatenated: what they lose is counted in samples."""

import contextlib
import dataclasses
import http.server
import io
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading

import kinds
import pytest
from kinds import PREPROCESS, TOKENIZER, members, write_tar

from vlm.cli import main
from vlm.cluster import watch
from vlm.cluster.watch import is_retriable
from vlm.config import DataConfig, MixturePart
from vlm.data import storage
from vlm.data.example_reader import ExampleReader
from vlm.data.faults import BadSample, BadSamples, TooManyBad
from vlm.data.pipeline import train_batches
from vlm.data.sources import open_source
from vlm.errors import DataError

EACH = 20
FIELDS = DataConfig("", eval_split=None, prefetch=0)


def write_shards(folder, count: int, each: int = EACH) -> str:
    folder.mkdir()
    for shard in range(count):
        inside = [m for n in range(each) for m in members(shard * each + n)]
        write_tar(folder / f"{shard:03d}.tar", inside)
    return str(folder / f"{{000..{count - 1:03d}}}.tar")


def batches_of(source: str, access: str, **changes):
    if access == "stream":
        changes |= {"interleave": 4, "shuffle": 16}
    config = dataclasses.replace(FIELDS, source=source, access=access, **changes)
    return train_batches(config, PREPROCESS, TOKENIZER, batch_size=4, seed=0)


def read_all(source: str, access: str) -> tuple[list, list[BadSample]]:
    config = dataclasses.replace(FIELDS, source=source, access=access)
    found = [read.example for read in ExampleReader(config, "train").read()]
    faults = [example for example in found if isinstance(example, BadSample)]
    return [example for example in found if not isinstance(example, BadSample)], faults


# -------------------------------------------------------------------------------- missing


@pytest.mark.parametrize("access", ["random", "stream"])
def test_a_run_stops_when_most_shards_are_missing(tmp_path, access):
    source = write_shards(tmp_path / "data", 30)
    for shard in range(1, 29):
        (tmp_path / "data" / f"{shard:03d}.tar").unlink()
    with (
        pytest.raises(
            TooManyBad, match=r"of [\d,]+ samples are bad .*missing shard \(of [\d,]+ samp"
        ),
        contextlib.closing(batches_of(source, access)) as batches,
    ):
        list(itertools.islice(batches, 20))


@pytest.mark.parametrize("access", ["random", "stream"])
def test_one_missing_shard_of_many_is_logged_and_passed_over(tmp_path, access, caplog):
    source = write_shards(tmp_path / "data", 30)
    (tmp_path / "data" / "017.tar").unlink()
    with contextlib.closing(batches_of(source, access)) as batches:
        for _ in range(3 * 30 * EACH // 4):  # three epochs: the same shard is missing in each
            next(batches)
    assert batches.bad.kinds.keys() == {"missing shard"}
    lost = batches.bad.kinds.total() * EACH
    assert f"{lost:,} of " in batches.bad.report()
    assert "no shard" in caplog.text
    assert f"{EACH} samples are lost" in caplog.text


@pytest.mark.parametrize("access", ["random", "stream"])
@pytest.mark.parametrize("note", ["img2dataset", "open_clip", "vlm", None])
def test_what_a_shard_holds_is_known_or_estimated(tmp_path, access, note):
    source = write_shards(tmp_path / "data", 8)
    folder, sizes = tmp_path / "data", {f"{n:03d}.tar": EACH for n in range(8)}
    (folder / "005.tar").unlink()
    sizes["005.tar"] = 77
    for name, count in sizes.items():
        if note == "img2dataset":
            stats = {"count": 999, "successes": count}
            (folder / name.replace(".tar", "_stats.json")).write_text(json.dumps(stats))
    if note == "open_clip":
        (folder / "sizes.json").write_text(json.dumps(sizes))
    if note == "vlm":
        lines = [json.dumps({"file": name, "examples": count}) for name, count in sizes.items()]
        (folder / "manifest.jsonl").write_text("\n".join(lines))
    good, (fault,) = read_all(source, access)
    assert len(good) == 7 * EACH
    assert fault.kind == "missing shard"
    assert fault.samples == (77 if note else EACH)
    assert pickle.loads(pickle.dumps(fault)).record() == fault.record()


def test_lost_shards_do_not_stop_a_run_before_their_share_is_known():
    record = {"kind": "missing shard", "where": "x", "why": "no shard", "samples": 1000}
    bad = BadSamples(0.05, None, examples=100_000)
    bad.take(0, 8, [record] * 5)  # all at once, before anything else is seen: 5 of 100 shards
    with pytest.raises(TooManyBad, match="6,000 of 100,000 samples are bad"):
        bad.take(1, 8, [record])
    bad = BadSamples(0.05, None, examples=100_000)
    for epoch in range(4):
        bad.take(epoch, 0, [record] * 5)
        bad.take(epoch, 95_000, [])
    few = BadSamples(0.05, None, examples=4000, spare=2000)  # one of 64 processes
    few.take(0, 8, [record] * 2)
    with pytest.raises(TooManyBad):
        few.take(0, 8, [record])
    again = BadSamples(0.05, None, examples=4000, spare=2000)
    again.restore({"0": few.state()}, 0)
    assert again.lost == few.lost


# ------------------------------------------------------------------------------------ cut


@pytest.mark.parametrize("access", ["random", "stream"])
def test_a_tar_that_is_cut_anywhere_is_named(tmp_path, access):
    path = tmp_path / "a.tar"
    write_tar(path, [m for n in range(8) for m in members(n)])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        starts = [m.offset for m in tar.getmembers()]
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    for cut in [*starts[4:], *(start + 100 for start in starts[4:]), end - 512, end]:
        path.write_bytes(whole[:cut])
        good, faults = read_all(str(path), access)
        complete = sum(start + 512 <= cut for start in starts[3::3])  # where the next one starts
        assert len(good) == complete, cut
        assert [fault.kind for fault in faults] == ["broken shard"]
        assert "a.tar" in str(faults[0])
    for padding in (512, 1024, 9216):  # one block of zeros shows that nothing is lost
        path.write_bytes(whole[:end] + bytes(padding))
        good, faults = read_all(str(path), access)
        assert (len(good), faults) == (8, [])


@pytest.mark.parametrize("access", ["random", "stream"])
def test_what_follows_the_end_of_a_tar_is_named(tmp_path, access):
    write_tar(tmp_path / "a.tar", [m for n in range(8) for m in members(n)])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole + whole)
    good, (fault,) = read_all(str(tmp_path / "a.tar"), access)
    assert len(good) == 8
    assert "data follows the end-of-archive marker" in str(fault)
    hole = bytes(3 << 20)  # a download that reserved its space and was stopped
    (tmp_path / "a.tar").write_bytes(whole.rstrip(b"\0") + hole)
    good, (fault,) = read_all(str(tmp_path / "a.tar"), access)
    assert len(good) == 8
    assert "nothing but zeros" in str(fault)


def test_a_cut_shard_loses_what_it_should_hold_and_does_not(tmp_path):
    source = write_shards(tmp_path / "data", 4)
    path = tmp_path / "data" / "002.tar"
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[3 * 11].offset
    path.write_bytes(path.read_bytes()[:cut])
    for access in ("random", "stream"):
        good, (fault,) = read_all(source, access)
        assert len(good) + fault.samples == 4 * EACH
    out = tmp_path / "out"
    assert main(["data", "prepare", source, str(out), "--examples", "100"]) == 0


def test_prepare_and_show_count_what_random_access_lost(tmp_path, capsys):
    source = write_shards(tmp_path / "data", 4)
    (tmp_path / "data" / "001.tar").unlink()
    assert main(["data", "prepare", source, str(tmp_path / "out"), "--examples", "100"]) == 0
    assert f"{3 * EACH} examples in 1 shards" in (output := capsys.readouterr()).out
    assert f"left out: {EACH} missing shard" in output.out
    assert main(["data", "show", source, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bad"] == {"missing shard": EACH}


# ------------------------------------------------------------- tar files of other programs


def pack(tool: str, folder, path) -> None:
    names = sorted(p.name for p in folder.iterdir())
    if tool == "tarfile":
        with tarfile.open(path, "w") as tar:
            for name in names:
                tar.add(folder / name, name)
        return
    program, *options = tool.split()
    if shutil.which(program) is None:
        pytest.skip(f"no {program} here")
    command = [program, *options, "-cf", str(path), "-C", str(folder), *names]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize("access", ["random", "stream"])
@pytest.mark.parametrize(
    "tool",
    [
        "tarfile",
        "tar",
        "tar -b1",
        "tar -b2048",
        "tar --format=v7",
        "tar --format=ustar",
        "tar --format=posix",
        "tar --format=oldgnu",
        "bsdtar",
        "bsdtar --format=ustar",
        "busybox tar",
    ],
)
def test_tar_files_of_any_program_are_whole(tmp_path, tool, access):
    (tmp_path / "in").mkdir()
    for name, data in (m for n in range(9) for m in members(n)):
        (tmp_path / "in" / name).write_bytes(data)
    pack(tool, tmp_path / "in", tmp_path / "a.tar")
    good, faults = read_all(str(tmp_path / "a.tar"), access)
    assert [e["caption"] for e in good] == [f"picture {n}" for n in range(9)]
    assert faults == []


# ------------------------------------------------------------------------------- servers


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; answers each path's first `failures` requests with `status`."""

    files: dict[str, bytes]
    failures: dict[str, int]
    status = 503

    def _answer(self) -> None:
        left = self.failures.get(self.path, 0)
        self.failures[self.path] = left - 1
        data = self.files.get(self.path)
        status = self.status if left > 0 else 200 if data is not None else 404
        body = data if status == 200 and data is not None else b""
        start, end = 0, len(body)
        if status == 200 and (wanted := self.headers.get("Range")):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(int(last or end) + 1, end), 206
        self.send_response(status)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(body)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[start:end])

    do_GET = do_HEAD = _answer

    def log_message(self, *args) -> None:
        """Log nothing."""


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(storage, "BACKOFF", 0.001)
    handler = type("Handler", (Server,), {"files": {}, "failures": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{running.server_port}"
        yield handler
        running.shutdown()


def tar_bytes(numbers) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in (m for n in numbers for m in members(n)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("access", ["random", "stream"])
def test_a_server_that_is_busy_is_asked_again(server, access):
    server.files = {f"/{n}.tar": tar_bytes(range(5 * n, 5 * n + 5)) for n in range(4)}
    server.failures = {"/2.tar": 3}
    good, faults = read_all(f"{server.url}/{{0..3}}.tar", access)
    assert ([e["caption"] for e in good], faults) == ([f"picture {n}" for n in range(20)], [])


@pytest.mark.parametrize("access", ["random", "stream"])
@pytest.mark.parametrize(("status", "kind"), [(503, "failed read"), (404, "missing shard")])
def test_only_a_server_that_says_so_has_no_such_shard(server, access, status, kind):
    server.files = {f"/{n}.tar": tar_bytes(range(5 * n, 5 * n + 5)) for n in range(4)}
    server.failures, server.status = {"/2.tar": 10**6}, status
    good, (fault,) = read_all(f"{server.url}/{{0..3}}.tar", access)
    assert len(good) == 15
    assert fault.kind == kind
    assert fault.samples == 5


def read_batches(config: DataConfig, count: int) -> None:
    batches = train_batches(config, PREPROCESS, TOKENIZER, batch_size=4, seed=0)
    for _ in range(count):
        next(batches)


@pytest.mark.parametrize("access", ["random", "stream"])
@pytest.mark.parametrize(("status", "retriable"), [(503, True), (403, False), (404, False)])
def test_an_outage_is_retriable(server, access, status, retriable):
    """Of the whole server when the data is opened, or of one shard later."""
    server.files = {f"/{n}.tar": tar_bytes(range(5 * n, 5 * n + 5)) for n in range(4)}
    changes = {"interleave": 2} if access == "stream" else {}
    config = dataclasses.replace(
        FIELDS, source=f"{server.url}/{{0..3}}.tar", access=access, **changes
    )
    server.status = status
    for broken in (range(4), [2]):
        server.failures = {f"/{n}.tar": 10**6 for n in broken}
        with pytest.raises(DataError) as error:
            read_batches(config, 40)
        assert is_retriable(error.value) is retriable
    assert isinstance(error.value, TooManyBad)
    assert pickle.loads(pickle.dumps(error.value)).retriable is retriable
    assert ("resume when the storage responds" in str(error.value)) is retriable


@pytest.mark.slow
def test_the_supervisor_is_told_of_an_outage(server):
    server.files, server.failures = {"/0.tar": tar_bytes(range(5))}, {"/0.tar": 10**6}
    program = f"""
import vlm
from vlm.cluster import stop_all_on_failure
from vlm.data import storage
from vlm.data.sources import open_source
storage.BACKOFF = 0.001
with stop_all_on_failure():
    open_source(vlm.DataConfig("{server.url}/0.tar", access="random"), "train")
"""
    env = os.environ | {watch.SUPERVISED: "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )
    assert "DataError" in done.stderr
    assert done.returncode == watch.RETRY


def test_a_server_that_is_not_there_is_no_missing_shard(server):
    with pytest.raises(
        DataError, match=r"cannot be read|Cannot connect|none of the first"
    ) as error:
        open_source(
            dataclasses.replace(FIELDS, source="http://127.0.0.1:9/0.tar", access="random"), "train"
        )
    assert "there is no shard" not in str(error.value)


def test_a_broken_shard_of_a_mixture_is_counted(tmp_path):
    source = write_shards(tmp_path / "data", 4)
    (tmp_path / "data" / "001.tar").unlink()
    (tmp_path / "csv").mkdir()
    other = kinds.csv(tmp_path / "csv").source
    parts = (MixturePart(source, 1.0, access="random"), MixturePart(other, 1.0))
    config = DataConfig(mixture=parts, eval_split=None, prefetch=0)
    with pytest.raises(TooManyBad, match=r"20 of 125 samples are bad"):
        train_batches(config, PREPROCESS, TOKENIZER, batch_size=4, seed=0)
