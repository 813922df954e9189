"""Frozen parameters: no gradients, optimizer state or kernel FLOPs, but gathered like others."""

import dataclasses

import pytest
from small import experiment

from vlm.config import AdapterConfig, MeshConfig
from vlm.models.flops import has_backward, step_flops
from vlm.planning import plan
from vlm.planning.collectives import FSDP, GRADIENTS
from vlm.planning.compile import StateBytes, abstract_state, checkpoint_bytes, total_bytes
from vlm.planning.prediction import check_state
from vlm.planning.topology import parse_topology

SHARDED = MeshConfig(data=1, fsdp=8)
LOCKED = {"lock": "vision", "init_from": "model"}
ADAPTED = {"adapter": AdapterConfig(rank=8), "init_from": "model"}


def test_only_trained_parameters_have_gradients():
    """12 GiB of parameters on a chip with 16.8 usable, of which an adapter trains a small part."""
    l4, gib = parse_topology("l4:1"), 2**30
    assert l4.chip.usable < 24 * gib
    check_state(StateBytes(12 * gib, gib // 8, gib // 4, 0), l4, {"fsdp": 1})


def test_a_frozen_tower_is_planned_like_a_locked_one():
    frozen, locked = experiment(64, freeze=("vision/.*",)), experiment(64, **LOCKED)
    assert not has_backward(frozen, "vision")
    assert has_backward(frozen, "text")
    assert step_flops(frozen) == step_flops(locked)
    one, other = (plan(e, "h100:8", SHARDED).to_dict() for e in (frozen, locked))
    for part in ("memory", "flops", "collectives", "roofline"):
        assert one[part] == other[part]
    partly = experiment(64, freeze=("vision/.*/kernel",))
    assert has_backward(partly, "vision")


def test_the_tower_that_no_adapter_is_in_has_no_backward_pass():
    adapter = AdapterConfig(rank=8, targets=("text.*",))
    e = experiment(64, adapter=adapter, init_from="model")
    assert not has_backward(e, "vision")
    assert has_backward(e, "text")
    both = experiment(64, **ADAPTED)
    assert all(has_backward(both, tower) for tower in ("vision", "text"))
    assert not has_backward(dataclasses.replace(both, freeze=("text/.*",)), "text")


def test_frozen_parameters_are_gathered_and_not_reduced():
    """An adapted model moves its base for each pass; a locked tower only for the forward pass."""
    full, adapted, locked = (
        plan(experiment(64, **fields), "h100:8", SHARDED).sent for fields in ({}, ADAPTED, LOCKED)
    )
    assert adapted[FSDP] >= full[FSDP]
    assert 0.6 * full[FSDP] < locked[FSDP] < full[FSDP]
    assert adapted[GRADIENTS] < 0.5 * full[GRADIENTS]
    once = {"mesh": dataclasses.replace(SHARDED, gather="step")}
    full, locked = (
        plan(experiment(64, **once, **fields), "h100:8").sent for fields in ({}, LOCKED)
    )
    assert locked[FSDP] == pytest.approx(full[FSDP])


def test_a_checkpoint_of_an_adapter_has_no_base_model():
    e = experiment(64, steps=10, **ADAPTED)
    state = abstract_state(e)
    stored = total_bytes(dataclasses.replace(state, frozen={}))
    assert plan(e, "h100:1").needs().checkpoint_bytes == stored < total_bytes(state)
    locked = experiment(64, **LOCKED)
    assert checkpoint_bytes(locked) == total_bytes(abstract_state(locked))
