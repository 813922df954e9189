"""A training step is the same with micro-batches, on any number of devices, and when repeated."""

import dataclasses
import functools
import gc
import json
import math
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import AS_USERS

from vlm import sharding
from vlm.config import AdapterConfig, Experiment, MeshConfig
from vlm.data.faults import BadSamples
from vlm.errors import ConfigError, TrainingError
from vlm.evaluation.training_report import _flat
from vlm.models import adapters
from vlm.planning.collectives import GRADIENTS
from vlm.planning.compile import compile_step
from vlm.sharding import global_batch, make_mesh, path_names
from vlm.training.bucket_sync import BucketSync
from vlm.training.logs import Logs
from vlm.training.loop import train
from vlm.training.run import Run
from vlm.training.step import Trainer, TrainState, compute_dtype
from vlm.training.watchdog import ActivityTimer


def make(experiment: Experiment, devices: int = 1) -> Trainer:
    return Trainer(experiment, make_mesh(experiment.mesh, jax.devices()[:devices]))


def test_a_trainer_is_freed_after_its_last_use(tiny):
    """Each phase of a run has its own, with the weights of its teacher on the devices."""
    trainer = make(tiny())
    freed = weakref.ref(trainer)
    assert trainer.step_at(16) is trainer.step
    del trainer
    gc.collect()
    assert freed() is None


def batch(step: int, size: int = 16) -> dict[str, np.ndarray]:
    """Random images, each with a related text."""
    random = np.random.default_rng(step)
    images = random.integers(0, 256, (size, 16, 16, 3), np.uint8)
    tokens = np.concatenate([images[:, :8, 0, 0] % 250 + 2, np.zeros((size, 8))], 1)
    return {"images": images, "tokens": tokens.astype(np.int32)}


def run(trainer: Trainer, steps: int, state: TrainState | None = None):
    """The losses of some steps, and the state after them."""
    state = trainer.init(jnp.int32(20)) if state is None else state
    losses = []
    for step in range(steps):
        state, metrics = trainer.step(state, global_batch(batch(step), trainer.mesh))
        losses.append(float(metrics["loss"]))
    return losses, state


def copy(state: TrainState) -> TrainState:
    """The step consumes its state."""
    return jax.tree.map(jnp.copy, state)


def assert_near(a, b, tolerance):
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(a)]
    for path, x, y in zip(paths, jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        worst = np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max()
        assert worst <= tolerance, (path_names(path), worst)


NOISY = {"vision": {"dropout": 0.1, "patch_dropout": 0.5}, "text": {"dropout": 0.1}}


@pytest.fixture(scope="module")
def noisy(tiny):
    """Dropout, patch dropout and text masking on; averaged parameters."""
    # Adam divides a gradient by its own size: with a tiny eps it would show the rounding of those
    # near zero, which another order of summing changes, as large as any update.
    rule = {"ema": 0.99, "warmup": 0.0, "eps": 1e-3}
    experiment = tiny(**NOISY, optimizer=rule, text_masking=0.25)
    trainer = make(experiment)
    return trainer, *run(trainer, 3)


@pytest.mark.parametrize(("devices", "micro", "tolerance"), [(1, 4, 1e-6), (4, 8, 1e-5)])
def test_micro_batches_are_the_batch(noisy, devices, micro, tolerance):
    trainer, losses, state = noisy
    experiment = dataclasses.replace(trainer.experiment, micro_batch_size=micro)
    got_losses, got = run(make(experiment, devices), 3)
    np.testing.assert_allclose(got_losses, losses, rtol=tolerance)
    assert_near(got.params, state.params, tolerance)
    assert_near(got.ema, state.ema, tolerance)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=4)], ids=["data", "fsdp"])
def test_micro_batches_send_their_gradients_once(tiny, mesh, monkeypatch):
    monkeypatch.setattr("vlm.sharding.SMALLEST_SHARDED", 1)

    def sent(micro):
        found = compile_step(tiny(micro_batch_size=micro), make_mesh(mesh))
        return sum(c.sent for c in found.collectives if c.place == GRADIENTS)

    whole = sent(None)
    assert whole > 0
    assert sent(8) <= 1.1 * whole


@pytest.mark.parametrize("gather", ["layer", "step"])
@pytest.mark.parametrize("micro", [None, 8])
def test_gathers_of_a_layer_and_of_the_whole_step_compute_the_same(
    alone, tiny, gather, micro, monkeypatch
):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 1)
    mesh = MeshConfig(data=2, fsdp=4, gather=gather)
    trainer = make(tiny(mesh=mesh, micro_batch_size=micro), devices=8)
    np.testing.assert_allclose(run(trainer, 20)[0], alone[1], rtol=1e-5)


def test_whole_gathers_need_a_mesh_without_tensor():
    with pytest.raises(ConfigError, match="gather step needs tensor 1"):
        MeshConfig(fsdp=2, tensor=2, gather="step")


@pytest.fixture(scope="module")
def alone(tiny):
    trainer = make(tiny())
    return trainer, *run(trainer, 20)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(),
        MeshConfig(data=1, fsdp=8),
        MeshConfig(data=2, fsdp=2, tensor=2),
    ],
    ids=["data", "fsdp", "all"],
)
def test_eight_devices_are_one_device(alone, tiny, mesh, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 1)
    _, losses, _ = alone
    trainer = make(tiny(mesh=mesh), devices=8)
    got, state = run(trainer, 20)
    np.testing.assert_allclose(got, losses, rtol=1e-5)
    if mesh.fsdp is not None:  # parameters, moments and all lie in parts
        kernel = state.params["text"]["transformer"]["blocks"]["mlp"]["up"]["kernel"]
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
        for x in (kernel, *moments):
            assert x.addressable_shards[0].data.size == x.size // (mesh.fsdp * mesh.tensor)


def test_lion_is_the_same_on_eight_devices(tiny, monkeypatch):
    """Lion's sign amplifies rounding errors of gradients: there must be none."""
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 1)
    states = []
    for mesh, devices in ((MeshConfig(), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 8)):
        experiment = tiny(mesh=mesh, optimizer={"name": "lion"})
        states.append(run(make(experiment, devices), 6)[1].params)
    assert_near(*states, tolerance=1e-6)  # each step moves a parameter by up to 1e-3


def test_the_loss_falls(alone):
    _, losses, state = alone
    assert losses[-1] < losses[0]
    assert int(state.step) == 20


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(alone):
    trainer, _, state = alone
    state = copy(state)
    state.params["logit_scale"] = jnp.float32(100)  # its exponential is not a float32
    before = copy(state)
    after, metrics = trainer.step(state, global_batch(batch(0), trainer.mesh))
    assert not metrics["finite"]
    assert int(after.skipped) == 1
    assert int(after.step) == int(before.step) + 1
    assert_near((after.params, after.opt_state), (before.params, before.opt_state), 0)
    after.params["logit_scale"] = jnp.float32(2)
    after, metrics = trainer.step(after, global_batch(batch(0), trainer.mesh))
    assert metrics["finite"]
    assert int(after.skipped) == 1


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_the_log_stops_or_counts(tiny, tmp_path, nonfinite):
    experiment = tiny(run_dir=str(tmp_path / "run"), optimizer={"on_nonfinite": nonfinite})
    whole = Run.create(experiment)
    fine = {"loss": jnp.float32(1), "finite": jnp.array(True), "tokens": jnp.float32(5)}
    samples = BadSamples(1.0, None)
    samples.take(0, 8, [], texts_cut=2)
    with (
        BucketSync(whole.folder) as sync,
        Logs(whole, sync, ActivityTimer(), first_step=0, total_steps=8) as logs,
    ):
        logs.set_phase(experiment, 0, samples=samples)
        for step in (1, 2, 4, 5):
            logs.step(step, fine)
            if step == 2:
                logs.step(3, fine | {"finite": jnp.array(False)})
        # The row of step 4 is written when the device has surely come so far.
        if nonfinite == "stop":
            with pytest.raises(TrainingError, match=r"not finite at step 3.*on-nonfinite skip"):
                logs.step(6, fine)
        else:
            logs.step(6, fine)
    assert '"nonfinite": 1' in whole.log.read_text()
    assert '"texts_cut": 0.25' in whole.log.read_text()


@pytest.mark.parametrize(
    ("most", "message"),
    [
        (25, r"not finite at any of the 3 steps, so the model is unchanged"),
        (2, r"not finite in 2 steps in a row, up to step 2: .*max-skipped-in-a-row"),
    ],
)
def test_a_run_that_skips_too_many_steps_fails(tiny, tmp_path, monkeypatch, most, message):
    broken = jnp.float32(jnp.nan), {}
    monkeypatch.setattr("vlm.training.step.objective", lambda *_, **__: broken)
    optimizer = {"on_nonfinite": "skip", "max_skipped_in_a_row": most}
    folder = tmp_path / "run"
    with pytest.raises(TrainingError, match=message):
        train(tiny(run_dir=str(folder), optimizer=optimizer, steps=3, log_every=1))
    assert not (folder / "bundle").exists()
    lines = (folder / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # NaN is no JSON
    assert {row["loss"] for row in rows if "loss" in row} == {None}
    assert all(math.isnan(_flat(row)["loss"]) for row in rows if "loss" in row)


def test_the_scale_is_capped(alone):
    trainer, _, state = alone
    updates = []
    for start in (99.9999, 150.0):  # one that starts above is not cut, and rises no further
        before = copy(state)
        before.params["logit_scale"] = jnp.log(jnp.float32(start))
        _, metrics = trainer.step(before, global_batch(batch(0), trainer.mesh))
        updates.append(float(metrics["scale"]))
    assert updates[0] <= 100 * (1 + 1e-6)
    assert 140 < updates[1] <= 150 * (1 + 1e-6)


def test_the_average_follows_the_parameters(noisy):
    trainer, _, state = noisy
    before = copy(state)
    after, _ = trainer.step(copy(state), global_batch(batch(3), trainer.mesh))
    decay = min(0.99, (1 + 3) / (10 + 3))  # after three steps the ramp still rules
    expected = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, before.ema, after.params)
    assert_near(after.ema, expected, 1e-6)
    used = trainer.model(after).logit_bias[...]
    assert float(used) == float(after.ema["logit_bias"])


def test_only_an_adapter_is_trained_and_saved(tiny):
    plain, adapted = make(tiny()), make(tiny(adapter=AdapterConfig(rank=1)))
    saved = plain.checkpoint_state(plain.abstract_state)
    assert saved.params is plain.abstract_state.params
    assert plain.from_checkpoint(saved) == plain.abstract_state
    assert plain.abstract_state.frozen == {}
    state = adapted.abstract_state
    paths = [path_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    assert paths
    assert all(adapters.is_trained(path) for path in paths)
    assert "vision" in state.frozen
    assert adapted.checkpoint_state(state).frozen == {}
    assert adapted.checkpoint_state(state).params is state.params


def test_old_names_of_the_state_partition_warn(tiny):
    trainer = make(tiny())
    state = trainer.abstract_state
    with pytest.warns(DeprecationWarning, match="Trainer.kept is renamed to Trainer.checkpoint_"):
        assert trainer.kept(state).params is state.params
    with pytest.warns(DeprecationWarning, match="Trainer.divide is renamed to Trainer.partition"):
        assert trainer.divide(state.params) == (state.params, {})


def test_products_are_in_float32_on_a_cpu_by_default():
    assert compute_dtype("auto") == jnp.float32
    assert compute_dtype("bfloat16") == jnp.bfloat16


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_locked_tower_has_no_gradient_and_no_optimizer_state(tiny, tower):
    other = {"vision": "text", "text": "vision"}[tower]
    trainer = make(tiny(lock=tower, init_from="model", optimizer={"ema": 0.9}))
    state = trainer.init(jnp.int32(20))
    for part in (state.params, state.opt_state, state.ema):
        names = {n for p, _ in jax.tree_util.tree_leaves_with_path(part) for n in path_names(p)}
        assert tower not in names
        assert other in names
    before = copy(state.frozen)
    data = global_batch(batch(0), trainer.mesh)
    compute = functools.partial(trainer._value_and_grad, size=16)
    _, gradient = jax.eval_shape(compute, state, data, jax.random.key(0))
    assert set(gradient) == {other, "logit_scale", "logit_bias"}
    _, after = run(trainer, 3, state)
    assert_near(after.frozen, before, 0)


def test_a_locked_tower_runs_once_with_micro_batches(tiny):
    """Its embeddings need no second pass, which the compiler leaves out."""
    loops = []
    for changes in ({}, {"lock": "vision", "init_from": "model"}):
        trainer = make(tiny(micro_batch_size=8, **changes))
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch(0))
        program = trainer.step.lower(trainer.abstract_state, inputs).compile(AS_USERS or None)
        loops.append(program.as_text().count(" while("))
    # Of micro-batches, twice; of each tower's blocks: forward, forward again, backward.
    assert loops == [2 + 3 + 3, 2 + 1 + 3]


def test_small_images_take_fewer_tokens_and_train_all_positions(alone):
    trainer, _, state = alone
    before = np.asarray(state.params["vision"]["position"])
    halfway = dataclasses.replace(copy(state), total_steps=jnp.int32(40))
    after, metrics = trainer.step_at(8)(halfway, global_batch(batch(0), trainer.mesh))
    moved = np.abs(np.asarray(after.params["vision"]["position"]) - before).max(1)
    assert (moved > 0).all()
    assert metrics["tokens"] == 16 * (4 + 16)
    assert trainer.tokens_per_step(16) == 16 * (16 + 16)


def test_norms_are_logged_for_each_tower(alone):
    trainer, _, state = alone
    after, metrics = trainer.step(copy(state), global_batch(batch(0), trainer.mesh))
    for tower in ("vision", "text"):
        norm = float(optax.tree.norm(after.params[tower]))
        assert float(metrics[f"param_norm_{tower}"]) == pytest.approx(norm, rel=1e-5)
    parts = np.array([float(metrics[f"grad_norm_{tower}"]) for tower in ("vision", "text")])
    assert 0 < np.square(parts).sum() <= float(metrics["grad_norm"]) ** 2 * (1 + 1e-5)
