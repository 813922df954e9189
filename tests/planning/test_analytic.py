"""Parts of the analytic estimates: micro-batches, unfused attention, and several slices."""

import dataclasses

import pytest
from small import experiment

from vlm.chips import CHIPS
from vlm.config import MeshConfig
from vlm.planning import plan
from vlm.planning.analytic import analytic_operations, fused_attention
from vlm.planning.collectives import TENSOR, in_loss
from vlm.planning.compile import StateBytes

TOWERS_ONLY = StateBytes(0, 0, 0, 0)  # without the traffic of an update


@pytest.mark.parametrize(("remat", "passes"), [("none", 3), ("full", 4)])
def test_micro_batches_run_forward_twice(remat, passes):
    whole = experiment(64, MeshConfig(data=2, fsdp=1, tensor=2), remat=remat)
    parts = dataclasses.replace(whole, micro_batch_size=16)
    sums = [plan(e, "h100:4").sent[TENSOR] for e in (parts, whole)]
    assert sums[0] / sums[1] == pytest.approx(passes / (passes - 1))
    memory = [analytic_operations(e, CHIPS["h100"], 4, TOWERS_ONLY)[1] for e in (parts, whole)]
    assert memory[0] / memory[1] == pytest.approx((passes + 1) / passes)
    launches = [plan(e, "h100:4").roofline.launches for e in (parts, whole)]
    assert launches[0] / launches[1] == pytest.approx(4 * 4 / 3)


def test_no_kernel_takes_biases_or_bounded_logits():
    words, h100 = experiment().model.text, CHIPS["h100"]
    e = experiment(dtype="bfloat16")
    plain = dataclasses.replace(words, causal=False)
    assert fused_attention(e, h100, 77, plain)
    for fields in ({"positions": "alibi"}, {"softcap": 50.0}):
        for chip in (h100, CHIPS["v5e"]):
            assert not fused_attention(e, chip, 77, dataclasses.replace(plain, **fields))


def test_slices_are_joined_by_the_network_of_the_data_center():
    """Each of 16 devices of a slice sends its part of the gradients at its part of the network."""
    e = experiment(64 * 64)
    one, four = (plan(e, name, compiled=False) for name in ("v5e:4x4", "4xv5e:4x4"))
    chip = CHIPS["v5e"]
    trained = four.memory.parameters / (four.mesh["data"] // 4)
    seconds = 2 * 3 / 4 * trained / chip.network
    assert one.roofline is not None
    assert four.roofline is not None
    assert four.roofline.exposed > one.roofline.exposed + 0.9 * seconds


def test_attention_on_a_mesh_with_tensor_is_not_of_the_loss():
    """Names in the program of a TPU, data=2 and tensor=2."""
    layer = "while/body/closed_call/cond/branch_0_fun/shard_map"
    assert not in_loss(f"jit(_step)/jvp()/{layer}/attention/pallas_call")
    assert not in_loss(f"jit(_step)/transpose(jvp())/{layer}")
    assert in_loss("jit(_step)/jvp()/shard_map/while/body/closed_call/dot_general")
