"""A checkpoint over the devices of two processes: each holds its share, and both encode as one."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import mesh_host
import numpy as np
import pytest
from flax import nnx
from quick import QUICK

from vlm.bundle import Bundle, load
from vlm.models.dual_encoder import DualEncoder
from vlm.sharding import SMALLEST_SHARDED
from vlm.weights.rules import flat_arrays

GOLDEN = pathlib.Path(__file__).parent / "golden"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    """The golden CLIP of Hugging Face, so wide that its kernels and its table are cut."""
    golden = load(GOLDEN / "hf_clip")
    vision, text = golden.config.vision, golden.config.text
    config = dataclasses.replace(
        golden.config,
        vision=dataclasses.replace(vision, width=96, mlp_dim=192),
        text=dataclasses.replace(text, width=72, heads=3, mlp_dim=144),
    )
    model = DualEncoder(config, rngs=nnx.Rngs(0))
    folder = tmp_path_factory.mktemp("wide") / "hf"
    Bundle(model, golden.preprocess, golden.tokenizer, "wide").save(folder, "huggingface")
    return folder


def run(checkpoint: pathlib.Path, fsdp: int, folder: pathlib.Path) -> None:
    """Two processes of two devices each, to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for i in range(2):
        env = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK}",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i),
            "VLM_CACHE": str(folder / "cache"),
        }
        command = [sys.executable, mesh_host.__file__, str(checkpoint), str(fsdp), str(folder)]
        with (folder / f"log{i}").open("w") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait(200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    message = "\n".join((folder / f"log{i}").read_text()[-3000:] for i in range(2))
    assert codes == [0, 0], message


@pytest.mark.parametrize("fsdp", [4, 2])
def test_two_processes_hold_a_checkpoint_together(checkpoint, tmp_path, fsdp):
    run(checkpoint, fsdp, tmp_path)
    one = load(checkpoint)
    whole = {name: np.asarray(array) for name, array in flat_arrays(one.model)}
    message = [json.loads((tmp_path / f"output{i}.json").read_text()) for i in range(2)]
    cut = {name for name, axes in message[0]["parts"].items() if axes == ["fsdp"]}
    assert message[0]["parts"] == message[1]["parts"]
    assert {"text.embedding", "vision.transformer.blocks.mlp.up.kernel"} <= cut
    assert all(whole[name].size >= SMALLEST_SHARDED for name in cut)

    # What each process holds is its own, in its place, and together they hold everything.
    spans = {name: [set(), set()] for name in whole}
    for i in range(2):
        for key, data in np.load(tmp_path / f"held{i}.npz").items():
            name, _, span = key.split(" ", 2)
            index = tuple(slice(*ends) for ends in json.loads(span))
            assert np.array_equal(data, whole[name][index]), key
            assert data.size == whole[name].size // (fsdp if name in cut else 1)
            spans[name][i].add(span)
    for name, (first, second) in spans.items():
        assert len(first | second) == (fsdp if name in cut else 1), name
        if fsdp == 4 and name in cut:
            assert not first & second  # each host its own shards

    for i in range(2):
        with np.load(tmp_path / f"encoded{i}.npz") as z:
            np.testing.assert_allclose(z["image"], one.encode_image(mesh_host.images()), atol=2e-6)
            np.testing.assert_allclose(z["text"], one.encode_text(mesh_host.TEXTS), atol=2e-6)
            assert z["scale"] == one.logit_scale
        assert "tower 'none' is unknown" in message[i]["refused"]
    again = load(tmp_path / "saved")
    for name, array in flat_arrays(again.model):
        assert np.array_equal(array, whole[name]), name
