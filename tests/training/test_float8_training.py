"""Training with float8 products: which layers have them, and where."""

import cuda
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vlm
from vlm.config import MeshConfig, Phase
from vlm.errors import ConfigError
from vlm.models import float8
from vlm.models.adapters import linear_layers
from vlm.planning.compile import batch_of
from vlm.sharding import make_mesh
from vlm.training.step import Trainer


@pytest.fixture(scope="module")
def trainer(tiny) -> Trainer:
    experiment = tiny(matmul_dtype="float8", dtype="bfloat16", remat="full")
    return Trainer(experiment, make_mesh(MeshConfig(), jax.devices()[:1]))


def test_a_step_has_six_layers_of_each_tower_in_float8(trainer):
    """Three products each, of which two are of gradients; evaluation has none."""
    step = cuda.lowered(trainer.step, trainer.abstract_state, batch_of(trainer.experiment))
    assert "f8E4M3FN" in step
    assert "f8E5M2" in step
    tokens = jax.ShapeDtypeStruct((8, trainer.experiment.model.text.context_length), "int32")
    assert "f8E" not in cuda.lowered(trainer.embed_texts, trainer.abstract_state, tokens)


def test_the_first_and_last_layers_stay_as_they_are(trainer):
    model = nnx.eval_shape(trainer._build)
    layers = linear_layers(float8.in_float8(model))
    names = {name for name, layer in layers.items() if getattr(layer, "float8", False)}
    parts = ("attention.query", "attention.key", "attention.value", "attention.out")
    own = {f"transformer.blocks.{part}" for part in (*parts, "mlp.up", "mlp.down")}
    assert names == {f"{tower}.{name}" for tower in ("vision", "text") for name in own}


def test_a_step_rounds_little(trainer, tiny):
    """Loss and gradient of a step are near those without, and not the same."""
    plain = Trainer(tiny(dtype="bfloat16", remat="full"), trainer.mesh)
    rng = np.random.default_rng(0)
    batch = {
        "images": rng.integers(0, 256, (16, 16, 16, 3), np.uint8),
        "tokens": rng.integers(1, 300, (16, 16), np.int32),
    }
    found = [t.step(t.init(jnp.int32(10)), batch)[1] for t in (trainer, plain)]
    for name in ("loss", "grad_norm"):
        ours, theirs = (float(metrics[name]) for metrics in found)
        assert 0 < abs(ours - theirs) < 0.1 * theirs, name


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ConfigError, match="and this model has none"):
        float8.in_float8(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))


def test_devices_that_would_emulate_it_are_refused(trainer, monkeypatch):
    assert "emulated" in float8.check_float8(trainer.mesh)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU from Ada or Hopper on, and cpu"):
        float8.check_float8(trainer.mesh)
    monkeypatch.setattr(float8, "compute_capability", lambda: 9.0)
    assert "emulated" not in float8.check_float8(trainer.mesh)


def test_a_mesh_whose_devices_exchange_scales_is_noted():
    for mesh, exchanged in ((MeshConfig(fsdp=2), False), (MeshConfig(tensor=2), True)):
        text = float8.check_float8(make_mesh(mesh, jax.devices()[:2]))
        assert ("exchange the largest element" in text) is exchanged


@pytest.mark.untyped
def test_the_precision_of_a_later_phase_is_checked_first(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(float8, "compute_capability", lambda: 0.0)
    monkeypatch.setattr(float8.jax, "default_backend", lambda: "tpu")
    phase = Phase({"matmul_dtype": "float8"}, step=3)
    with pytest.raises(ConfigError, match=r"phase 1 \(step 3\).*needs an NVIDIA GPU"):
        vlm.train(tiny(run_dir=str(tmp_path / "run"), phases=(phase,)))
