"""Two processes over loopback measure what one does, each with a share of the images."""

import json
import os
import socket
import subprocess
import sys

import pytest
import tiny

CODE = """\
import sys

from vlm.cli import main
from vlm.evaluation import distributed

distributed.ROWS = 2  # six drawings are more than one round of both processes
sys.exit(main(sys.argv[1:]))
"""


def evaluations(count: int, *args: object) -> list[tuple[str, str]]:
    """What each of so many processes of `vlm eval` says: its output and its errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    line = [sys.executable, "-c", CODE, "eval", *map(str, args)]
    env = os.environ | {"XLA_FLAGS": "", "COLUMNS": "200"}
    if count > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    running = [
        subprocess.Popen(
            line,
            env=env | ({"JAX_PROCESS_ID": str(i)} if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        printed = [process.communicate(timeout=400) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (out, err) in zip(running, printed, strict=True):
        assert process.returncode == 0, out + err
    return printed


@pytest.mark.slow
def test_hosts_share_an_evaluation(tmp_path):
    run, data = tiny.run(), tiny.folder() / "data"
    names = f"retrieval:{data},sugarcrepe:add_att"
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        printed = evaluations(
            count, run, "--tasks", names, "--data.data-dir", tmp_path, "--out", out
        )
        assert "left out sugarcrepe:add_att" in printed[0][1]
        assert "R@1" in printed[0][0]
        assert all("R@1" not in out and "left out" not in err for out, err in printed[1:])
        result = json.loads((out / "results.json").read_text())["results"][0]
        assert result["provenance"]["evidence"].keys() >= {"data_hash", "fingerprint"}
        found.append((result["metrics"], result["provenance"]["evidence"]))
    assert found[0] == found[1]
    assert found[0][0]["image_to_text_R@1"]["n"] == 6
    assert len(list((tmp_path / "2").glob("*.parquet"))) == 1
