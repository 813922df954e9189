"""The training step of every config, lowered for an NVIDIA GPU: `lowering_platforms`.

Widths, sequences and dtypes are those of the configs; towers are one block deep, as `lax.scan` is
the same program for any depth.
"""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import cuda
import jax
import pytest

from vlm.config import DataConfig, Experiment, PreprocessConfig, load_config
from vlm.planning.compile import batch_of, on_platform, planned_supervision
from vlm.sharding import batch_sharding, make_mesh, placed
from vlm.training.step import Trainer

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.py"))
KINDS = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}


def shallow(experiment: Experiment, vision=(), text=(), **changes) -> Experiment:
    model = experiment.model
    vision = dataclasses.replace(model.vision, depth=1, **dict(vision))
    text = dataclasses.replace(model.text, depth=1, **dict(text))
    model = dataclasses.replace(model, vision=vision, text=text)
    return dataclasses.replace(experiment, model=model, **changes)


def program(experiment: Experiment) -> tuple[str, int]:
    """The StableHLO of a step on eight GPUs, and the number of arrays of the train state."""
    experiment = on_platform(experiment, "gpu")
    mesh, extra = make_mesh(experiment.mesh), planned_supervision(experiment)
    trainer = Trainer(experiment, mesh, classes=extra.classes, teacher=extra.teacher)
    state = jax.tree.map(placed, trainer.abstract_state, trainer.state_shardings)
    batch = jax.tree.map(lambda x: placed(x, batch_sharding(mesh)), batch_of(experiment))
    return cuda.lowered(trainer.step, state, batch), len(jax.tree.leaves(state))


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_step_of_a_config(path, monkeypatch):
    """Its only calls are cuDNN's, for each tower in both directions, and its state is donated."""
    cuda.as_on_a_gpu(monkeypatch)
    experiment = load_config(path)
    step, arrays = program(shallow(experiment))
    assert set(re.findall(r"custom_call @([\w$]+)", step)) == KINDS
    backward = [kind for name, kind in cuda.attention_calls(step) if name.endswith("Backward")]
    trained = 1 if experiment.lock in ("vision", "text") else 2
    assert len(backward) == trained
    assert (Counter(backward)["CAUSAL"] == 1) == experiment.model.text.causal
    donated = re.findall(r"tf\.aliasing_output|jax\.buffer_donor", step)
    assert len(donated) == arrays


@pytest.mark.slow
def test_naflex_and_padded_texts_use_lengths(monkeypatch):
    cuda.as_on_a_gpu(monkeypatch)
    (siglip,) = (load_config(path) for path in CONFIGS if path.stem == "siglip_b16")
    preprocess = PreprocessConfig(resize="naflex", patch_size=16, image_size=256, max_patches=256)
    vision = {"max_patches": 256, "image_size": 256}
    changes = {"preprocess": preprocess, "data": DataConfig(), "batch_size": 8}
    experiment = shallow(siglip, vision, {"pad_id": 1}, **changes)
    step, _ = program(experiment)
    assert set(cuda.attention_calls(step)) == {(kind, "PADDING") for kind in KINDS}
