"""Many files: the most recent are open, and the examples are the same for any limit."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import kinds
import numpy as np
import pytest

from vlm.data import open_files
from vlm.data.open_files import LocalFile, OpenFiles
from vlm.data.sources import open_source


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(open_files, "OPEN", OpenFiles(2))
    return open_files


def test_files_that_are_read_in_turn_are_reopened_at_their_positions(tmp_path, few):
    data = [np.random.default_rng(i).bytes(5000) for i in range(12)]
    for i, content in enumerate(data):
        (tmp_path / str(i)).write_bytes(content)
    files = [LocalFile(str(tmp_path / str(i))) for i in range(12)]

    def read(i: int) -> bytes:
        return b"".join(files[i].read(70) for _ in range(72))

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(read, range(12))) == data
    assert len(few.OPEN) <= 2
    files[3].seek(-10, os.SEEK_END)
    assert files[3].read() == data[3][-10:]
    assert files[3].read(1) == b""
    for file in files:
        file.close()
    assert len(few.OPEN) == 0
    with pytest.raises(FileNotFoundError):
        LocalFile(str(tmp_path / "none"))
    assert len(few.OPEN) == 0


def test_a_file_in_use_is_not_closed(few):
    closed = []
    with few.OPEN.use("a", lambda: "A", closed.append) as first:
        for key in "bcdef":
            with few.OPEN.use(key, key.upper, closed.append):
                pass
        assert first == "A"
        assert closed == ["B", "C", "D", "E"]
    few.OPEN.forget("a")
    few.OPEN.forget("unknown")
    assert closed == ["B", "C", "D", "E", "A"]


@pytest.mark.parametrize("kind", [kinds.array_record, kinds.parquet_bytes])
def test_the_limit_does_not_change_the_examples(tmp_path, kind, monkeypatch):
    config = kind(tmp_path)
    expected = [open_source(config, "train")[i] for i in range(kinds.COUNT)]
    monkeypatch.setattr(open_files, "OPEN", OpenFiles(1))
    source = open_source(config, "train")
    order = np.random.default_rng(0).permutation(kinds.COUNT).tolist()
    with ThreadPoolExecutor(4) as pool:
        got = dict(zip(order, pool.map(source.__getitem__, order), strict=True))
    assert [got[i] for i in range(kinds.COUNT)] == expected
    assert len(open_files.OPEN) <= 1


MANY = """
import resource, sys

resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
sys.path.insert(0, sys.argv[2])
from kinds import PREPROCESS, TOKENIZER
from vlm.config import DataConfig
from vlm.data.pipeline import train_batches

access = "stream" if "parquet" in sys.argv[1] else "auto"
config = DataConfig(sys.argv[1], eval_split=None, access=access, prefetch=0, shuffle=1)
batches = train_batches(config, PREPROCESS, TOKENIZER, batch_size=150, seed=0)
for _ in range(8):
    next(batches)
assert not batches.bad.kinds, batches.bad.summary()
batches.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "array_record"])
def test_more_files_than_a_process_may_open(tmp_path, suffix):
    pytest.importorskip("resource")
    import pyarrow
    import pyarrow.parquet
    from array_record.python.array_record_module import ArrayRecordWriter

    from vlm.data.array_record import serialize

    image = kinds.jpeg(1)
    for n in range(150):
        path = str(tmp_path / f"{n:03}.{suffix}")
        rows = [{"image": image, "caption": f"{n} {i}"} for i in range(12)]
        if suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
            continue
        writer = ArrayRecordWriter(path, "group_size:1")
        for row in rows:
            writer.write(serialize(row))
        writer.close()
    here = os.path.dirname(kinds.__file__)
    line = [sys.executable, "-c", MANY, str(tmp_path / f"*.{suffix}"), here]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
