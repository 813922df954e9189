"""Each update rule, and each recipe's first ten updates, beside the published arithmetic.

The references are written down here in float64, one array at a time, from what these files compute:
big_vision's `optax.py` (chain of `make`, `scale_by_adafactor`) and `create_learning_rate_schedule`
in its `utils.py`; open_clip's `scheduler.py`, with the update of PyTorch's `AdamW` and
`clip_grad_norm_`; Lion of arXiv:2302.06675, algorithm 2; Muon of kellerjordan.github.io/posts/muon.
"""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vlm.config import OptimizerConfig, load_config
from vlm.config.defaults import with_defaults
from vlm.sharding import path_names
from vlm.training.optimizer import learning_rate, make_optimizer

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.py"))
TOTAL, UPDATES = 100, 10

# Forty stacked blocks, more than the 32 from which Adafactor factors, and what lies around them.
SHAPES = {
    "stem/kernels/0": (3, 3, 3, 8),
    "position": (17, 48),
    "embedding": (64, 48),
    "transformer/blocks/attention/query/kernel": (40, 48, 2, 36),
    "transformer/blocks/attention/query/bias": (40, 2, 36),
    "transformer/blocks/attention/out/kernel": (40, 2, 36, 48),
    "transformer/blocks/mlp_norm/scale": (40, 48),
    "projection/kernel": (48, 16),
}


def nested(flat: dict[str, np.ndarray]) -> dict:
    tree: dict = {}
    for name, x in flat.items():
        *parents, leaf = ("vision", *name.split("/"))
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[leaf] = jnp.asarray(x, jnp.float32)
    return tree


def drawn(seed: int, scale: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    # In float32 first, so that both sides begin with the same numbers.
    return {
        name: np.float64(np.float32(scale * random.standard_normal(shape)))
        for name, shape in SHAPES.items()
    }


# ------------------------------------------------------------------------- the references


def clipped(gradients, c: OptimizerConfig):
    if c.clip_norm is None:
        return gradients
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
    return {name: g * min(1.0, c.clip_norm / norm) for name, g in gradients.items()}


def adam(g, state, t, c):
    m, v = state.get("m", 0.0), state.get("v", 0.0)
    state["m"] = m = c.b1 * m + (1 - c.b1) * g
    state["v"] = v = c.b2 * v + (1 - c.b2) * g * g
    return (m / (1 - c.b1**t)) / (np.sqrt(v / (1 - c.b2**t)) + c.eps)


def lion(g, state, t, c):
    m = state.get("m", np.zeros_like(g))
    state["m"] = c.b2 * m + (1 - c.b2) * g
    return np.sign(c.b1 * m + (1 - c.b1) * g)


def adafactor(g, state, t, c):
    decay = min(c.b2, 1 - t**-0.8)
    square = g * g + 1e-30
    order = np.argsort(g.shape)
    if g.ndim >= 2 and g.shape[order[-2]] >= 32:
        small, large = order[-2], order[-1]
        rows = decay * state.get("rows", 0.0) + (1 - decay) * square.mean(large, keepdims=True)
        columns = decay * state.get("cols", 0.0) + (1 - decay) * square.mean(small, keepdims=True)
        state["rows"], state["cols"] = rows, columns
        u = g / np.sqrt(rows / rows.mean(small, keepdims=True)) / np.sqrt(columns)
    else:
        state["v"] = decay * state.get("v", 0.0) + (1 - decay) * square
        u = g / np.sqrt(state["v"])
    # `optax.ema`: the average is kept in bfloat16, and the decay is one too beside it.
    kept = np.float64(state.get("m", np.zeros(g.shape, ml_dtypes.bfloat16)))
    m = np.float64(ml_dtypes.bfloat16(c.b1)) * kept + (1 - c.b1) * u
    state["m"] = np.float32(m).astype(ml_dtypes.bfloat16)
    return m


def nadam(g, state, t, c):
    """Adam with Nesterov's momentum (Dozat, 2016), for parameters that Muon does not update."""
    adam(g, state, t, c)
    m = c.b1 * state["m"] / (1 - c.b1 ** (t + 1)) + (1 - c.b1) * g / (1 - c.b1**t)
    return m / (np.sqrt(state["v"] / (1 - c.b2**t)) + c.eps)


def muon(g, state, t, c):
    """Of one matrix: Nesterov's momentum, five rounds of Newton-Schulz, the size of Adam's."""
    momentum = 0.95
    m = momentum * state.get("m", 0.0) + (1 - momentum) * g
    state["m"] = m
    # optax corrects both terms for their start at zero, as Dozat's Nesterov Adam does.
    x = momentum * m / (1 - momentum ** (t + 1)) + (1 - momentum) * g / (1 - momentum**t)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x if wide else x.T
    return 0.2 * math.sqrt(max(x.shape)) * x


def one_array(name, g, state, t, c):
    """The update of one parameter; a stack of blocks is many parameters."""
    rule = {"adamw": adam, "lion": lion, "adafactor": adafactor, "muon": nadam}[c.name]
    if "blocks" not in name:
        return rule(g, state, t, c)
    layers = []
    for i, layer in enumerate(g):
        own = state.setdefault(i, {})
        if c.name == "muon" and name.endswith("kernel"):
            sides = (-1, layer.shape[-1]) if "/out/" in name else (layer.shape[0], -1)
            layers.append(muon(layer.reshape(sides), own, t, c).reshape(layer.shape))
        else:
            layers.append(rule(layer, own, t, c))
    return np.stack(layers)


def decays(name: str, c: OptimizerConfig) -> bool:
    if c.weight_decay_rule == "big_vision":  # ".*/kernel$"
        return "kernel" in name
    plain = name.removeprefix("transformer/blocks/")
    vector = len(SHAPES[name]) - (plain != name) < 2 or "bias" in name or "scale" in name
    return not vector  # open_clip: two axes or more


def shape_of_schedule(c: OptimizerConfig, step: int) -> float:
    """big_vision's, relative to its peak; open_clip's cosine is the same, one step ahead."""
    warmup, cooldown = c.warmup * TOTAL, c.cooldown * TOTAL
    value = 1.0
    if c.schedule == "cosine":
        value = 0.5 * (1 + math.cos(math.pi * max(0.0, step - warmup) / (TOTAL - warmup)))
    elif c.schedule == "rsqrt" and step >= warmup:
        value = 1 / math.sqrt(1 + (step - warmup) / warmup)  # timescale: the warm-up
    value *= min(1.0, step / warmup)
    return value * min(1.0, (TOTAL - step) / cooldown) if c.schedule == "rsqrt" else value


def reference(c: OptimizerConfig, gradients: list[dict]) -> dict[str, np.ndarray]:
    params, state = drawn(0, 0.1), {name: {} for name in SHAPES}
    for step, raw in enumerate(gradients):
        shape = shape_of_schedule(c, step)
        for name, g in clipped(raw, c).items():
            u = one_array(name, g, state[name], step + 1, c)
            pull = c.weight_decay * params[name] if decays(name, c) else 0.0
            rate = c.learning_rate * shape
            if c.weight_decay_rule == "big_vision":
                params[name] = params[name] - rate * u - shape * pull
            else:
                params[name] = params[name] * 1.0 - rate * pull - rate * u
    return params


# ------------------------------------------------------------------------------ the tests


@functools.cache
def compiled(c: OptimizerConfig):
    rule = make_optimizer(c)
    return rule, jax.jit(rule.update)


def ours(c: OptimizerConfig, gradients: list[dict]) -> dict[str, np.ndarray]:
    # What the rule does not depend on, so that recipes that share a rule share its program.
    rate = c.learning_rate if c.weight_decay_rule == "big_vision" else 1.0
    rule, update = compiled(dataclasses.replace(c, learning_rate=rate, warmup=0, schedule="wsd"))
    params = nested(drawn(0, 0.1))
    state = rule.init(params)
    for number, gradient in enumerate(gradients):
        updates, state = update(nested(gradient), state, params)
        rate = np.float32(learning_rate(c, jnp.float32(number / TOTAL)))
        params = jax.tree.map(lambda p, u, rate=rate: p - rate * np.asarray(u), params, updates)
    return {
        "/".join(path_names(path)[1:]): np.asarray(x, np.float64)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }


def compare(c: OptimizerConfig) -> None:
    # Of a size that the clipping of some steps changes and that of others does not.
    gradients = [drawn(step + 1, 10.0 ** -(step % 3 + 2)) for step in range(UPDATES)]
    expected, start = reference(c, gradients), drawn(0, 0.1)
    for name, got in ours(c, gradients).items():
        moved, off = np.abs(expected[name] - start[name]), np.abs(got - expected[name])
        assert moved.max() > 0, name
        # Adafactor's momentum is rounded to bfloat16 from a float32 on the one side and a float64
        # on the other: now and then to the other neighbour, up to 2^-8 of it away. Newton-Schulz
        # enlarges rounding.
        mean, worst = {"adafactor": (2e-5, 1e-2), "muon": (1e-4, 1e-4)}.get(c.name, (5e-6, 2e-5))
        # And parameters are float32: 3e-8 is half a unit in the last place of 0.3 to 0.5.
        assert off.mean() <= mean * moved.mean() + 1e-8, (name, off.mean() / moved.mean())
        assert off.max() <= worst * moved.max() + 1e-7, (name, off.max() / moved.max())


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("adamw", "big_vision"),
        ("lion", "big_vision"),
        ("lion", "open_clip"),
        ("adafactor", "open_clip"),
        ("muon", "big_vision"),
    ],
)
def test_a_rule_is_the_published_one(name, rule):
    decay = {"weight_decay": 0.04, "weight_decay_rule": rule}
    compare(OptimizerConfig(name=name, learning_rate=1e-3, warmup=0.02, **decay))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipes_first_updates_are_the_published_ones(path):
    # A hundred steps have no warm-up of half a percent: two steps of it.
    c = with_defaults(load_config(path)).optimizer
    compare(dataclasses.replace(c, warmup=max(c.warmup, 0.02)))


def test_the_sigmoid_recipes_take_big_visions_weight_decay():
    recipes = {path.stem: load_config(path).optimizer for path in CONFIGS}
    for stem in ("siglip_b16", "siglip_b16_1m", "siglip_so400m", "lit_b16"):
        c = recipes[stem]
        assert (c.name, c.weight_decay, c.weight_decay_rule) == ("adafactor", 1e-4, "big_vision")
        assert c.max_scale is None
    rule, params = make_optimizer(c), {"vision": {"norm": {"kernel": jnp.ones((4, 4))}}}
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = rule.update(still, rule.init(params), params)
    # A ten-thousandth of a kernel at the peak of the schedule, whatever the learning rate.
    taken = c.learning_rate * updates["vision"]["norm"]["kernel"]
    np.testing.assert_allclose(taken, 1e-4, rtol=1e-5)


def test_adafactors_memory_is_capped():
    # A gradient that changes its size: with b2 = 0.95 a second moment forgets in some 20 steps.
    c = OptimizerConfig(name="adafactor", b1=0.0, b2=0.95, weight_decay=0.0, clip_norm=None)
    rule, params = make_optimizer(c), {"vision": {"kernel": jnp.ones((64, 64))}}
    step = jax.jit(lambda state, g: rule.update({"vision": {"kernel": g}}, state, params))
    state = rule.init(params)
    for _ in range(300):
        _, state = step(state, jnp.ones((64, 64)))
    for _ in range(40):
        updates, state = step(state, jnp.full((64, 64), 0.1))
    # v = 0.95^40 + 0.01 (1 - 0.95^40); without the cap v would be above 0.6 and the update 0.12.
    expected = 0.1 / math.sqrt(0.95**40 + 0.01 * (1 - 0.95**40))
    np.testing.assert_allclose(updates["vision"]["kernel"], expected, rtol=1e-3)


@pytest.mark.parametrize("schedule", ["cosine", "rsqrt"])
def test_a_schedule_is_big_visions_at_every_step(schedule):
    own = {"cooldown": 0.3} if schedule in ("rsqrt", "wsd") else {}
    c = OptimizerConfig(learning_rate=2e-3, schedule=schedule, warmup=0.1, **own)
    for step in range(TOTAL + 1):
        got = float(learning_rate(c, jnp.float32(step / TOTAL)))
        assert got == pytest.approx(2e-3 * shape_of_schedule(c, step), rel=1e-5, abs=1e-9), step
