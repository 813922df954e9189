"""Losses, optimizers, schedules and masks of the user in a training step."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import batch, make, run

import vlm
from vlm.config import Code, from_dict, to_dict
from vlm.errors import ConfigError
from vlm.inputs.tokenizer import train_bpe
from vlm.losses import all_pairs
from vlm.training.custom_parts import with_parts

pytestmark = pytest.mark.untyped  # fields that take objects hold their import paths

counter = iter(range(10**6))
kept = []


def sigmoid_again(inputs):
    """The built-in sigmoid loss, written with `all_pairs`."""

    def losses(x, y, paired, parameters):
        scale, bias = parameters
        logits = jnp.exp(scale) * x @ y.T + bias
        return jax.nn.softplus(jnp.where(paired, -logits, logits))

    parameters = inputs.logit_scale, inputs.logit_bias
    return all_pairs(losses, inputs.z_image, inputs.z_text, parameters, mesh=inputs.mesh)[0].mean()


def decorrelation(inputs):
    """A loss that needs sums over the batch alone, with a value for the log."""
    z = inputs.z_image - inputs.z_image.mean(0)
    covariance = z.T @ z / len(z)
    off = covariance - jnp.diag(jnp.diag(covariance))
    return jnp.sum(off**2), {"trace": jnp.trace(covariance)}


def of_tokens(inputs):
    outputs = inputs.intermediates["vision/blocks/output"]  # (b, layers, n, d)
    assert outputs.shape[:2] == (16, 2)
    return jnp.mean(outputs.astype(jnp.float32) ** 2)


def noisy(inputs):
    return jnp.mean(jax.random.normal(inputs.key, (4,))) + inputs.z_image.mean()


def per_example(inputs):
    return jnp.sum(inputs.z_image * inputs.z_text, axis=1)


def fails(inputs):
    return (inputs.z_image @ jnp.ones(3)).sum()


def counts(inputs):
    return inputs.z_image.mean() * next(counter)


def leaks(inputs):
    kept.append(inputs.z_image.mean())
    return kept[-1]


def reports(inputs):
    jax.experimental.io_callback(kept.append, None, inputs.z_image.mean(), ordered=True)
    return inputs.z_image.mean()


def replicated(inputs):
    everywhere = jax.sharding.NamedSharding(inputs.mesh, jax.sharding.PartitionSpec())
    z = jax.lax.with_sharding_constraint(inputs.z_image, everywhere)
    cosines = jax.lax.with_sharding_constraint(z @ z.T, everywhere)
    for _ in range(40):
        cosines = jax.lax.with_sharding_constraint(jnp.tanh(cosines @ cosines), everywhere)
    return cosines.mean()


TABLE = np.linspace(0, 1, 16)


def with_a_constant(inputs):
    """NumPy arrays of the module are constants of the program."""
    return jnp.mean(inputs.z_image * TABLE)


def draws_from_numpy(inputs):
    return jnp.mean(inputs.z_image * np.random.default_rng().random(16))


def closes_over(inputs):
    values = lambda x, y, *_: jnp.exp(inputs.logit_scale) * x @ y.T  # noqa: E731
    return all_pairs(values, inputs.z_image, inputs.z_text, mesh=inputs.mesh)[0].mean()


def no_scalar_to_log(inputs):
    return inputs.z_image.mean(), {"z": inputs.z_image}


SIGMOID = {"loss": "sigmoid", "init_bias": -10.0}


@pytest.mark.parametrize("devices", [1, 8])
def test_a_loss_of_the_user_trains_as_the_built_in_one(tiny, devices):
    wanted, state = run(make(tiny(model=SIGMOID), devices), 2)
    got, own_state = run(make(tiny(model=SIGMOID, losses={sigmoid_again: 1.0}), devices), 2)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(own_state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # Adam divides small gradients by their size


@pytest.mark.parametrize("micro", [None, 8])
def test_losses_are_weighted_and_logged(tiny, micro):
    losses = {"softmax": 1.0, "sigmoid": 0.5, decorrelation: 2.0, noisy: 0.0, with_a_constant: 0.0}
    trainer = make(tiny(losses=losses, micro_batch_size=micro))
    metrics = trainer.step(trainer.init(jnp.int32(20)), batch(0))[1]
    terms = {
        name: float(metrics[f"loss/{name}"]) for name in ("softmax", "sigmoid", "decorrelation")
    }
    total = terms["softmax"] + 0.5 * terms["sigmoid"] + 2 * terms["decorrelation"]
    assert float(metrics["loss"]) == pytest.approx(total, rel=1e-6)
    assert 0 < float(metrics["loss/decorrelation/trace"]) < 1


@pytest.mark.parametrize("micro", [None, 8])
def test_a_loss_reads_activations_of_the_towers(tiny, micro):
    names = ("vision/blocks/output", "text/embedding")
    options = {"losses": {"softmax": 1.0, of_tokens: 0.1}, "loss_intermediates": names}
    trainer = make(tiny(micro_batch_size=micro, **options))
    metrics = trainer.step(trainer.init(jnp.int32(20)), batch(0))[1]
    assert float(metrics["loss/of_tokens"]) > 0
    wrong = make(tiny(**(options | {"loss_intermediates": ("vision/outputs",)})))
    with pytest.raises(ConfigError, match=r"'vision/outputs'.*vision/blocks/output"):
        run(wrong, 1)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (per_example, r"the loss test_own_parts:per_example returned an array \(16,\) of float32"),
        (fails, r"fails failed with \w+Error: .*\(embeddings are \(16, 16\); a loss is traced"),
        (counts, "counts is not pure: it differs between two calls"),
        (draws_from_numpy, "draws_from_numpy is not pure: it differs between two calls"),
        (closes_over, "uses a traced array from outside of itself, such as logit_scale"),
        (leaks, "leaks is not pure: it keeps a traced value"),
        (reports, "reports is not pure: it calls the host"),
        (no_scalar_to_log, "no_scalar_to_log returned a dict beside its value: return a dict of"),
        (lambda inputs: "0", "returned a str: return a float scalar"),
        (lambda: 0, "failed with TypeError"),
        (lambda inputs: 1.0, "is constant: compute it from z_image, z_text"),
        (lambda inputs: jnp.zeros(3).sum(), "is constant: compute it from z_image, z_text"),
    ],
)
def test_a_wrong_loss_is_one_sentence(tiny, loss, message):
    with pytest.raises(ConfigError, match=message):
        run(make(tiny(losses={loss: 1.0})), 1)


def test_a_loss_that_is_not_sharded_is_refused(tiny):
    experiment = tiny(losses={replicated: 1.0}, batch_size=64)
    trainer = make(experiment, 8)
    with pytest.raises(ConfigError, match="replicated is not sharded: each of 8 devices computes"):
        trainer.step(trainer.init(jnp.int32(20)), batch(0, 64))
    shared = make(tiny(losses={decorrelation: 1.0, noisy: 1.0}, batch_size=64), 8)
    shared.step(shared.init(jnp.int32(20)), batch(0, 64))


def own_optimizer():
    return optax.adamw(1e-2, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.0)


def with_rate():
    return optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1e-2, 0.0, 10))


def by_optimizer(tiny, **options):
    return dataclasses.replace(tiny(), optimizer=vlm.OptimizerConfig(max_scale=None, **options))


def test_a_whole_optimizer_of_the_user(tiny):
    plain = {"schedule": "constant", "warmup": 0.0, "clip_norm": None, "weight_decay": 0.0}
    wanted, _ = run(make(by_optimizer(tiny, learning_rate=1e-2, **plain)), 3)
    for transformation in (own_optimizer(), own_optimizer, "test_own_parts:own_optimizer"):
        got, _ = run(make(by_optimizer(tiny, transformation=transformation)), 3)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    got, _ = run(
        make(
            by_optimizer(
                tiny, name=optax.scale_by_adam(b2=0.98, eps=1e-6), learning_rate=1e-2, **plain
            )
        ),
        3,
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    # Given as a field of the experiment, an object is the whole optimizer.
    assert dataclasses.replace(tiny(), optimizer=own_optimizer).optimizer.transformation == (
        "test_own_parts:own_optimizer"
    )


def test_its_learning_rate_is_logged_where_it_keeps_one(tiny):
    def metrics(optimizer):
        trainer = make(by_optimizer(tiny, transformation=optimizer))
        return trainer.step(trainer.init(jnp.int32(20)), batch(0))[1]

    assert float(metrics(with_rate)["learning_rate"]) == pytest.approx(1e-2)
    assert "learning_rate" not in metrics(own_optimizer)


def test_a_schedule_of_the_user_is_a_factor_of_the_rate(tiny):
    experiment = by_optimizer(tiny, learning_rate=0.5, schedule=lambda progress: 1 - progress**2)
    trainer = make(experiment)
    state = dataclasses.replace(trainer.init(jnp.int32(20)), step=jnp.int32(10))
    assert float(trainer.step(state, batch(0))[1]["learning_rate"]) == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transformation": optax.constant_schedule(1.0)}, "failed with TypeError"),
        ({"transformation": int}, "is a int: give an optax.GradientTransformation"),
        ({"transformation": "nowhere:adam"}, "there is no module 'nowhere'"),
        ({"transformation": own_optimizer, "b1": 0.5}, "b1 is 0.5 and has no effect"),
        ({"schedule": lambda progress: 1.0, "warmup": 0.1}, "warmup is 0.1 and has no effect"),
        ({"schedule": lambda progress: jnp.ones(2)}, r"returned an array \(2,\)"),
        ({"rates": {"visoin/.*": 0.1}}, r"rates has 'visoin/\.\*', which matches no .*vision/"),
        ({"rates": {"vision/.*": -1.0}}, "the factor -1.0"),
        ({"decays": {"(": 1.0}}, "no regular expression"),
        ({"decays": {"text/.*": 1.0}, "weight_decay": 0.0}, "decays is .* and has no effect"),
        ({"name": own_optimizer, "b1": 0.5}, "b1 is 0.5 and has no effect"),
    ],
)  # fmt: skip
def test_wrong_optimizers_are_one_sentence(tiny, options, message):
    with pytest.raises(ConfigError, match=message):
        run(make(by_optimizer(tiny, **options)), 1)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"optimizer": "adam"}, r"optimizer is 'adam': give an optax transformation such as"),
        ({"evals": {"mine": print}}, "evals is a mapping: give a list of functions"),
        ({"loss": [per_example]}, "give a function, or a mapping of functions to weights"),
    ],
)
def test_wrong_parts_are_one_sentence(tiny, part, message):
    with pytest.raises(ConfigError, match=message):
        with_parts(tiny(), **part)


def test_frozen_parameters_stay_and_cost_no_optimizer_state(tiny):
    trainer = make(tiny(freeze=("vision/.*", ".*/bias")))
    before = trainer.init(jnp.int32(20))
    assert "vision" not in before.params
    frozen = jax.tree.map(np.array, before.frozen)
    _, state = run(trainer, 2, before)
    jax.tree.map(np.testing.assert_array_equal, frozen, state.frozen)
    for pattern, message in (("vison/.*", "matches no parameter"), (".*", "nothing is trained")):
        with pytest.raises(ConfigError, match=message):
            make(tiny(freeze=(pattern,)))


def test_rates_and_decays_by_name(tiny):
    def moved(**options):
        """The change of each parameter in one step of plain descent with decay alone."""
        experiment = by_optimizer(
            tiny,
            name=optax.scale(0.0),
            learning_rate=0.1,
            schedule="constant",
            warmup=0.0,
            **options,
        )
        trainer = make(experiment)
        state = trainer.init(jnp.int32(20))
        params = jax.tree.map(lambda x: jnp.full_like(x, 1.0), state.params)
        after = trainer.step(dataclasses.replace(state, params=params), batch(0))[0].params
        return lambda *path: float(1 - jnp.mean(functools.reduce(lambda t, n: t[n], path, after)))

    kernel = ("text", "transformer", "blocks", "mlp", "up", "kernel")
    usual = moved(weight_decay=0.5)
    assert usual(*kernel) == pytest.approx(0.05, rel=1e-3)
    assert usual("logit_scale") == 0
    named = moved(
        weight_decay=0.5,
        decays={".*/mlp/.*": 2.0, "logit_scale": 1.0},
        rates={"text/.*/up/kernel": 0.5, "text/.*": 0.0},
    )
    assert named(*kernel) == pytest.approx(0.05, rel=1e-3)  # twice the decay at half the rate
    assert named("text", "embedding") == 0
    assert named("logit_scale") == pytest.approx(0.05, rel=1e-3)


def test_an_activation_of_jax_and_a_policy_of_rematerialisation(tiny, tmp_path):
    remat = jax.checkpoint_policies.dots_saveable
    tower = {"activation": jax.nn.silu}
    experiment = tiny(vision=tower, text=tower, remat=remat)
    assert to_dict(experiment)["model"]["vision"]["activation"] == "jax.nn:silu"
    assert from_dict(vlm.Experiment, json.loads(json.dumps(to_dict(experiment)))) == experiment
    trainer = make(experiment)
    losses, state = run(trainer, 2)
    same, _ = run(make(tiny(vision=tower, text=tower)), 2)
    np.testing.assert_allclose(losses, same, rtol=1e-6)
    assert losses != run(make(tiny()), 2)[0]
    tokenizer = train_bpe(["a red square"] * 9, 300, 16)
    bundle = vlm.Bundle(trainer.model(state), trainer.preprocess, tokenizer, "silu")
    bundle.save(tmp_path / "model")
    z = vlm.load(tmp_path / "model").encode_text("a red square")
    np.testing.assert_array_equal(z, bundle.encode_text("a red square"))
    with pytest.raises(vlm.CheckpointError, match=r"no name for the activation jax\.nn:silu"):
        bundle.save(tmp_path / "other", "huggingface")
    for activation in (jnp.sin, "os:remove"):
        with pytest.raises(ConfigError, match=r"or a function of jax\.nn"):
            tiny(vision={"activation": activation})
    with pytest.raises(ConfigError, match="choose one of 'none', 'dots'"):
        tiny(remat="some")


def test_a_config_with_own_parts_is_json(tiny):
    experiment = tiny(
        losses={"sigmoid": 1.0, decorrelation: 0.5},
        optimizer=own_optimizer,
        evals=[of_tokens],
        dtype=jnp.bfloat16,
    )
    values = json.loads(json.dumps(to_dict(experiment)))
    assert values["losses"] == [["sigmoid", 1.0], ["test_own_parts:decorrelation", 0.5]]
    again = from_dict(vlm.Experiment, values)
    assert again == experiment
    assert again.losses[1][0].load() is decorrelation
    unnamed = tiny(losses={lambda inputs: 0.0: 1.0})
    again = from_dict(vlm.Experiment, to_dict(unnamed))
    with pytest.raises(ConfigError, match=r"losses was <.*lambda>.*pass it again"):
        run(make(again), 1)


def test_a_hash_covers_what_a_function_uses_and_not_its_layout(tmp_path, monkeypatch):
    def hash_of(text: str) -> str:
        name = f"module{next(counter)}"
        (tmp_path / f"{name}.py").write_text(text)
        return Code.of(f"{name}:loss").source_hash()

    monkeypatch.syspath_prepend(tmp_path)
    source = (
        "SIZE = 2\n\ndef helper(x):\n    return SIZE * x\n\ndef loss(x):\n    return helper(x)\n"
    )
    wanted = hash_of(source)
    assert wanted == hash_of("# a comment\n" + source + "\nother = 3\n")
    assert wanted != hash_of(source.replace("SIZE = 2", "SIZE = 3"))
    assert wanted != hash_of(source.replace("SIZE * x", "SIZE + x"))
