"""Two real processes read one stream, and their positions are one state that one resumes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import kinds
import numpy as np
import pytest

from vlm.data.pipeline import train_batches

HALF = """
import json, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
import numpy as np
from vlm.cluster import processes

if __name__ == "__main__":
    processes.start()
    sys.path.insert(0, sys.argv[1])
    import kinds
    from pathlib import Path
    from vlm.config import DataConfig, from_dict
    from vlm.data.pipeline import train_batches

    config = from_dict(DataConfig, json.loads(sys.argv[2]))
    iterator = train_batches(
        config, kinds.PREPROCESS, kinds.TOKENIZER, batch_size=4, seed=3,
        process_index=jax.process_index(), process_count=2,
    )
    images = [next(iterator)["images"] for _ in range(5)]
    state = iterator.get_state()
    iterator.close()
    np.save(sys.argv[3] + f"/{jax.process_index()}.npy", np.stack(images))
    Path(sys.argv[3], f"{jax.process_index()}.json").write_text(json.dumps(state))
"""


@pytest.mark.slow
def test_two_processes_make_one_stream_and_one_state(tmp_path):
    from vlm.config import to_dict

    config = kinds.make("mixture", tmp_path / "data")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    (tmp_path / "half.py").write_text(HALF)
    line = [sys.executable, tmp_path / "half.py", Path(__file__).parent]
    halves = [
        subprocess.Popen(
            [*line, json.dumps(to_dict(config)), tmp_path],
            env=os.environ
            | {
                "XLA_FLAGS": "",
                "JAX_PLATFORMS": "cpu",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(k),
            },
        )
        for k in range(2)
    ]
    try:
        assert [half.wait(120) for half in halves] == [0, 0]
    finally:
        for half in halves:
            half.kill()
    states = [json.loads((tmp_path / f"{k}.json").read_text()) for k in range(2)]
    assert states[0] == states[1]
    assert len(states[0]["lanes"]) == 4

    whole = train_batches(config, kinds.PREPROCESS, kinds.TOKENIZER, batch_size=8, seed=3)
    expected = np.stack([next(whole)["images"] for _ in range(5)])
    parts = [np.load(tmp_path / f"{k}.npy") for k in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)
    resumed = train_batches(config, kinds.PREPROCESS, kinds.TOKENIZER, batch_size=8, seed=3)
    resumed.set_state(states[0])
    np.testing.assert_array_equal(next(resumed)["images"], next(whole)["images"])
    for iterator in (whole, resumed):
        iterator.close()
