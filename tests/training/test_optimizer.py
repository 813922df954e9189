"""Schedules against worked values; effects of update rules on parameters."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm.config import OptimizerConfig
from vlm.errors import ConfigError
from vlm.sharding import is_stacked, path_names
from vlm.training.optimizer import decay_mask, learning_rate, make_optimizer

KEY = jax.random.key(0)


def parameters():
    """Names and shapes of the towers' parameters: two stacked blocks and the layers around them."""
    shapes = {
        "stem": {"kernels": {"0": (3, 3, 3, 32)}, "kernel": (4, 4, 3, 32), "bias": (32,)},
        "position": (16, 32),
        "transformer": {
            "blocks": {
                "attention": {
                    "query": {"kernel": (2, 32, 2, 16), "bias": (2, 2, 16)},
                    "out": {"kernel": (2, 2, 16, 32), "bias": (2, 32)},
                },
                "mlp": {"up": {"kernel": (2, 32, 64), "bias": (2, 64)}},
                "mlp_norm": {"scale": (2, 32), "bias": (2, 32)},
            }
        },
        "norm": {"scale": (32,), "bias": (32,)},
        "projection": {"kernel": (32, 16)},
    }
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(KEY, len(leaves))
    leaves = [jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
    return {"vision": tree.unflatten(leaves), "logit_scale": jnp.float32(2.0)}


def by_name(tree) -> dict[str, jax.Array]:
    return {"/".join(path_names(p)): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(
    ("schedule", "warmup", "cooldown", "values"),
    [
        ("cosine", 0.2, 0.2, {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 0.5, 1: 0}),
        ("cosine", 0.0, 0.2, {0: 1, 1 / 3: 0.75, 1: 0}),
        (
            "rsqrt",
            0.04,
            0.2,
            {0.02: 0.5, 0.04: 1, 0.16: 0.5, 0.64: 0.25, 0.9: 0.5 * 0.2 / 0.9**0.5, 1: 0},
        ),
        ("wsd", 0.1, 0.4, {0.05: 0.5, 0.1: 1, 0.6: 1, 0.8: 0.5, 1: 0}),
        ("constant", 0.1, 0.2, {0.05: 0.5, 0.1: 1, 1: 1}),
    ],
)
def test_schedules_have_their_worked_values(schedule, warmup, cooldown, values):
    config = OptimizerConfig(
        learning_rate=2e-3, schedule=schedule, warmup=warmup, cooldown=cooldown
    )
    for progress, share in values.items():
        rate = float(learning_rate(config, jnp.float32(progress)))
        assert rate == pytest.approx(2e-3 * share, rel=1e-5, abs=1e-9), progress


@pytest.mark.parametrize("schedule", ["cosine", "rsqrt", "wsd"])
def test_a_schedule_ends_at_its_end(schedule):
    config = OptimizerConfig(
        learning_rate=1e-3, end_learning_rate=1e-4, schedule=schedule, warmup=0.05
    )
    ends = [float(learning_rate(config, jnp.float32(p))) for p in (0.0, config.warmup, 0.999, 1.0)]
    assert ends[0] == 0
    assert ends[1] == pytest.approx(1e-3)
    assert 1e-4 < ends[2] < 1.1e-4
    assert ends[3] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"learning_rate": -1e-3},
            "OptimizerConfig.learning_rate is -0.001: choose a number from 0",
        ),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"layer_decay": -0.5}, "layer_decay is -0.5"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5: choose a number above 0 and at most 1"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0: choose a number above 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"text_rate": -1.0}, "text_rate is -1.0"),
        ({"b1": 1.0}, "b1 is 1.0: choose a number from 0 to below 1"),
        ({"b2": -0.1}, "b2 is -0.1"),
        ({"ema": 1.5}, "ema is 1.5"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"cooldown": 1.2}, "cooldown is 1.2: choose a number from 0 to 1"),
        (
            {"learning_rate": 1e-3, "end_learning_rate": 1.0},
            "end_learning_rate 1.0 is above learning_rate 0.001",
        ),
        (
            {"schedule": "constant", "end_learning_rate": 1e-5},
            "does not decay to end_learning_rate",
        ),
        ({"weight_decay": 0.2, "weight_decay_rule": "big_vision"}, "removes from every kernel"),
    ],
)
def test_invalid_rates_are_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        OptimizerConfig(**changes)


def test_only_matrices_have_weight_decay():
    decayed = {name for name, yes in by_name(decay_mask(parameters())).items() if yes}
    blocks = "vision/transformer/blocks"
    assert decayed == {
        "vision/stem/kernels/0",
        "vision/stem/kernel",
        "vision/position",
        f"{blocks}/attention/query/kernel",
        f"{blocks}/attention/out/kernel",
        f"{blocks}/mlp/up/kernel",
        "vision/projection/kernel",
    }
    kernels = {n for n, yes in by_name(decay_mask(parameters(), "big_vision")).items() if yes}
    assert kernels == decayed - {"vision/position"}
    # Without a gradient, an update is the decay alone.
    config = OptimizerConfig(weight_decay=0.1)
    params = parameters()
    zeros = jax.tree.map(jnp.zeros_like, params)
    rule = make_optimizer(config)
    updates, _ = rule.update(zeros, rule.init(params), params)
    for name, update in by_name(updates).items():
        expected = 0.1 * by_name(params)[name] if name in decayed else 0 * update
        np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_start_decay_is_in_place_of_weight_decay():
    """From 3.0 with a start of 1.0: each step goes lr * l2_sp of the way back, not to 0."""
    config = OptimizerConfig(l2_sp=0.5)  # weight_decay at its default of 0.1
    rule, zeros = make_optimizer(config), {"kernel": jnp.zeros((1, 1))}
    state = rule.init({"kernel": jnp.full((1, 1), 1.0)})
    params = {"kernel": jnp.full((1, 1), 3.0)}
    seen = []
    for _ in range(200):
        updates, state = rule.update(zeros, state, params)
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        seen.append(float(params["kernel"][0, 0]))
    assert seen[:2] == pytest.approx([3 - 0.1 * 0.5 * 2, 2.9 - 0.1 * 0.5 * 1.9])
    assert seen[-1] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("rule", ["open_clip", "big_vision"])
def test_the_factors_of_adapters_decay(rule):
    factors = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2)), "magnitude": jnp.ones(2)}
    params = {"vision": {"query": {"lora": factors}}}
    mask = decay_mask(params, rule)["vision"]["query"]["lora"]
    assert mask == {"a": True, "b": True, "magnitude": False}


@pytest.mark.untyped
def test_an_unknown_rule_of_decay_is_refused():
    with pytest.raises(ConfigError, match="choose one of 'open_clip', 'big_vision'"):
        decay_mask({}, "l2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cooldown": 0.4}, 'cooldown is 0.4 and has no effect: set schedule to "rsqrt" or "wsd"'),
        ({"name": "lion", "eps": 1e-8}, "eps is 1e-08 and has no effect"),
        ({"max_skipped_in_a_row": 9}, 'has no effect: set on_nonfinite to "skip"'),
        ({"l2_sp": 0.1, "weight_decay": 0.2}, "weight_decay is 0.2 and has no effect"),
    ],
)
def test_options_without_effect_are_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        OptimizerConfig(**changes)


@pytest.mark.parametrize("rule_of_decay", ["open_clip", "big_vision"])
def test_the_pull_is_towards_the_start(rule_of_decay):
    config = OptimizerConfig(
        learning_rate=0.5,
        weight_decay=0.0,
        l2_sp=0.1,
        weight_decay_rule=rule_of_decay,
        vision_rate=0.5,
    )
    rule, start = make_optimizer(config), parameters() | {"logit_scale": jnp.float32(1)}
    state = rule.init(start)
    moved = jax.tree.map(lambda x: x + 1.0, start)
    zeros = jax.tree.map(jnp.zeros_like, start)
    for _ in range(2):  # whatever the parameters are by then, it is measured from the start
        updates, state = rule.update(zeros, state, moved)
    for name, update in by_name(updates).items():
        share = {"vision": 0.5}.get(name.split("/")[0], 1.0) if rule_of_decay == "open_clip" else 2
        expected = 0.0 if name == "logit_scale" else 0.1 * share
        np.testing.assert_allclose(update, np.full(update.shape, expected), rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_every_rule_reduces_a_loss(name):
    config = OptimizerConfig(name=name, weight_decay=0.0)
    rule, start = make_optimizer(config), parameters()
    target = jax.tree.map(lambda x: 0.3 * jnp.sin(7 * x), start)

    def loss(params):
        return optax.tree.norm(jax.tree.map(jnp.subtract, params, target))

    @jax.jit
    def step(params, state):
        updates, state = rule.update(jax.grad(loss)(params), state, params)
        return jax.tree.map(lambda p, u: p - 0.05 * u, params, updates), state

    params, state = start, rule.init(start)
    for _ in range(60):
        params, state = step(params, state)
    assert loss(params) < 0.6 * loss(start)  # Muon takes steps of one length, however far it is


def test_the_first_step_of_adam_and_lion_is_the_sign_of_the_gradient():
    params = parameters()
    gradient = jax.tree.map(lambda x: 1e-3 * x, params)
    for name in ("adamw", "lion"):
        eps = {"eps": 1e-12} if name == "adamw" else {}
        config = OptimizerConfig(name=name, weight_decay=0.0, clip_norm=None, **eps)
        rule = make_optimizer(config)
        updates, _ = rule.update(gradient, rule.init(params), params)
        for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(u, np.sign(g), atol=1e-4)


def test_muon_makes_the_blocks_matrices_orthogonal():
    params = parameters()
    rule = make_optimizer(OptimizerConfig(name="muon", weight_decay=0.0))
    updates, _ = rule.update(params, rule.init(params), params)
    blocks = updates["vision"]["transformer"]["blocks"]
    for matrices in (
        blocks["attention"]["query"]["kernel"].reshape(2, 32, 32),
        blocks["attention"]["out"]["kernel"].reshape(2, 32, 32),
        blocks["mlp"]["up"]["kernel"],
    ):
        for matrix in matrices:
            values = np.linalg.svd(matrix, compute_uv=False)
            assert values.max() / np.median(values) < 1.7  # Newton-Schulz: about 0.7 to 1.2
            rms = float(jnp.sqrt(jnp.square(matrix).mean()))
            assert 0.1 < rms < 0.3  # 0.2, as Adam's updates have


def test_adafactor_keeps_its_momentum_in_bfloat16():
    state = make_optimizer(OptimizerConfig(name="adafactor")).init(parameters())
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    full = sum(x.size for x in jax.tree.leaves(parameters()))
    assert sum(x.size for x in floats if x.dtype == jnp.bfloat16) == full
    # Second moments of matrices are kept as rows and columns; those under 32 wide stay whole.
    shapes = {x.shape for x in floats if x.dtype == jnp.float32}
    assert (2, 32, 64) not in shapes
    assert {(2, 32), (2, 64)} <= shapes


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_stacks_of_different_depths_are_updated_as_alone(name):
    """As in towers with stages. Kernels of convolutions are no matrices for Muon."""
    shapes = {"mlp/up/kernel": (32, 64), "conv/kernel": (7, 7, 1, 32), "norm/scale": (32,)}
    stages = {
        str(number): {
            f"stages/{number}/blocks/{parameter}": (depth, *shape)
            for parameter, shape in shapes.items()
        }
        for number, depth in enumerate((1, 3))
    }
    rule = make_optimizer(OptimizerConfig(name=name, weight_decay=0.0, clip_norm=None))

    def updates(stages: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
        params = names_to({f"vision/{parameter}": shape for parameter, shape in stages.items()})
        gradient = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size)).reshape(x.shape), params)
        return by_name(rule.update(gradient, rule.init(params), params)[0])

    alone = updates(stages["0"]) | updates(stages["1"])
    together = updates(stages["0"] | stages["1"])
    assert together.keys() == alone.keys()
    for parameter, update in together.items():
        np.testing.assert_allclose(update, alone[parameter], atol=1e-4, err_msg=parameter)


def test_clipping_bounds_the_gradient_of_the_whole_model():
    params = parameters()
    gradient = jax.tree.map(lambda x: 100 * x, params)
    config = OptimizerConfig(name="lion", weight_decay=0.0, clip_norm=1.0)
    rule = make_optimizer(config)
    _, state = rule.update(gradient, rule.init(params), params)
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert float(optax.tree.norm(moments)) == pytest.approx((1 - config.b2) * 1.0, rel=0.05)


def test_lower_layers_learn_more_slowly():
    plain = OptimizerConfig(weight_decay=0.1)
    params = parameters()
    updates = []
    for config in (plain, dataclasses.replace(plain, layer_decay=0.5)):
        rule = make_optimizer(config)
        updates.append(by_name(rule.update(params, rule.init(params), params)[0]))
    for name, update in updates[0].items():
        factor = np.divide(updates[1][name], update)
        if "blocks" in name:  # the upper of two blocks at 1/2, the lower at 1/4
            np.testing.assert_allclose(factor[1], 0.5, rtol=1e-5)
            np.testing.assert_allclose(factor[0], 0.25, rtol=1e-5)
        elif "stem" in name or "position" in name:
            np.testing.assert_allclose(factor, 0.125, rtol=1e-5)
        else:
            np.testing.assert_allclose(factor, 1, rtol=1e-5)
    assert math.isclose(float(updates[1]["logit_scale"]), float(updates[0]["logit_scale"]))


def names_to(shapes: dict[str, tuple[int, ...]]) -> dict:
    """A tree of ones, from paths to shapes."""
    tree: dict = {}
    for name, shape in shapes.items():
        *parents, leaf = name.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[leaf] = jnp.ones(shape)
    return tree


# Names of the towers' parameters, each with its power of the decay.
RESNET = {
    "stem/0/kernel": 4, "stem_norms/0/scale": 4, "stages/0/0/conv1/kernel": 3,
    "stages/0/1/conv1/kernel": 2, "stages/1/0/shortcut/kernel": 1, "pool/query/kernel": 0,
    "position": 0,
}  # fmt: skip
FASTVIT = {
    "stem/kernel": 4, "stem_halve/kernel": 4, "stem_project/kernel": 4,
    "stages/0/layers/0/mixer/kernel": 3, "stages/1/halve/conv/kernel": 2,
    "stages/1/layers/0/mlp/up/kernel": 2, "stages/1/layers/1/conv/kernel": 1, "last/kernel": 0,
    "squeeze/down/kernel": 0, "projection/kernel": 0,
}  # fmt: skip


CONVNEXT = {
    "stem/kernel": 4, "stem_norm/scale": 4, "stages/0/blocks/conv/bias": 3,
    "stages/1/halve/kernel": 2, "stages/1/halve_norm/scale": 2, "stages/1/blocks/conv/bias": (2, 1),
    "norm/scale": 0, "projection/kernel": 0,
}  # fmt: skip
VITAMIN = {
    "stem/conv1/kernel": 5, "stem/norm1/scale": 5, "stem/stages/0/0/conv/kernel": 4,
    "stem/stages/1/0/shortcut/kernel": 3, "stem/last/kernel": 2, "stem/last_norm/scale": 2,
    "position": 2, "transformer/blocks/mlp/up/bias": (2, 1), "norm/scale": 0,
    "projection/kernel": 0,
}  # fmt: skip
EFFICIENTNET = {
    "stem/kernel": 6, "stem_norm/scale": 6, "stages/0/first/conv/kernel": 5,
    "stages/0/blocks/conv/kernel": (4, 3), "stages/1/first/expand/kernel": 2,
    "stages/1/blocks/conv_norm/scale": (1,), "projection/kernel": 0,
}  # fmt: skip
GROUPVIT = {
    "stem/kernel": 5, "stem_norm/scale": 5, "position": 5,
    "stages/0/transformer/blocks/attention/query/kernel": (4, 3), "stages/0/groups": 4,
    "stages/1/transformer/blocks/mlp/up/bias": (2, 1), "norm/scale": 0, "projection/kernel": 0,
}  # fmt: skip
DINO_TXT = {
    "stem/kernel": 3, "class_token": 3, "position": 3, "registers": 3, "pre_norm/scale": 3,
    "transformer/blocks/mlp/up/bias": (2, 1), "norm/scale": 0, "head/blocks/mlp/up/bias": (0, 0),
    "head_norm/scale": 0, "pooler/kernel": 0, "pool/blocks/0/mlp/up/bias": 0,
    "projection/kernel": 0,
}  # fmt: skip
X_CLIP = {
    "stem/kernel": 3, "position": 3, "blocks/block/attention/query/kernel": (2, 1),
    "patch_norm/scale": 0, "frame_position": 0, "frame_transformer/blocks/mlp/up/bias": (0, 0),
}  # fmt: skip
TOWERS = {
    "groupvit": GROUPVIT, "dino_txt": DINO_TXT, "x_clip": X_CLIP, "resnet": RESNET,
    "fastvit": FASTVIT, "convnext": CONVNEXT, "vitamin": VITAMIN, "efficientnet": EFFICIENTNET,
}  # fmt: skip


@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_lower_layers_of_a_convolutional_tower_learn_more_slowly(tower):
    text = {"text/transformer/blocks/mlp/up/bias": (3, 2), "text/embedding": (2, 2)}
    stacks = {name for name in tower if is_stacked(name.split("/"))}
    depth = {name: np.size(power) if name in stacks else 2 for name, power in tower.items()}
    ones = names_to({f"vision/{name}": (rows, 2) for name, rows in depth.items()} | text)
    rule = make_optimizer(OptimizerConfig(name="lion", weight_decay=0, layer_decay=0.5))
    got = by_name(rule.update(ones, rule.init(ones), ones)[0])
    for name, power in tower.items():
        expected = np.broadcast_to(
            0.5 ** np.reshape(power, (-1, 1)).astype(float), (depth[name], 2)
        )
        np.testing.assert_allclose(got[f"vision/{name}"], expected, err_msg=name)
    np.testing.assert_allclose(got["text/embedding"], 0.5**4)
    blocks = got["text/transformer/blocks/mlp/up/bias"]
    np.testing.assert_allclose(blocks[:, 0], [0.125, 0.25, 0.5])


def test_a_tower_has_a_rate_of_its_own():
    ones = names_to({"vision/norm/scale": (2,), "text/norm/scale": (2,), "logit_scale": ()})
    rule = make_optimizer(OptimizerConfig(name="lion", vision_rate=0.1, text_rate=0.0))
    got = by_name(rule.update(ones, rule.init(ones), ones)[0])
    np.testing.assert_allclose(got["vision/norm/scale"], 0.1)
    np.testing.assert_allclose(got["text/norm/scale"], 0)
    assert float(got["logit_scale"]) == 1
