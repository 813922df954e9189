"""Sources that were opened, and used by threads, before a process forks: the child reads the same.

Readers of other libraries fork (PyTorch's DataLoader); grain's do not. In a process of its own, for
JAX forbids forks where it has run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import kinds
from vlm.config import DataConfig
from vlm.data.sources import open_source
folder = Path(sys.argv[1])
makers = {
    "parquet": kinds.parquet_bytes, "arrow": kinds.arrow, "records": kinds.array_record,
    "tables": lambda f: DataConfig(kinds.tars_beside_tables(f)),
}
sources = {}
for name, make in makers.items():
    (folder / name).mkdir()
    sources[name] = open_source(make(folder / name), "train")
expected = {name: [source[i] for i in range(len(source))] for name, source in sources.items()}
stop = threading.Event()
def read():
    while not stop.is_set():
        for source in sources.values():
            for i in range(0, len(source), 4):
                source[i]
with ThreadPoolExecutor(3) as pool:
    for _ in range(3):
        pool.submit(read)
    for _ in range(4):
        child = os.fork()
        if not child:
            ok = all(s[i] == expected[n][i] for n, s in sources.items() for i in range(len(s)))
            os._exit(0 if ok else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    stop.set()
"""


@pytest.mark.slow
def test_a_child_of_a_fork_reads_the_same(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "VLM_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    subprocess.run(command, env=env, check=True, timeout=120)
