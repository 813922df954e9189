"""Towers in a user's own program: transforms, meshes with Explicit axes, `jax.shard_map`, NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm import sharding
from vlm.config import (
    AdapterConfig,
    ConvNeXtConfig,
    EfficientNetConfig,
    EfficientNetStage,
    EncoderTextConfig,
    FastViTConfig,
    FastViTStage,
    ModelConfig,
    ResNetConfig,
    ResNetV1Config,
    SwinConfig,
    TextConfig,
    ViTaminConfig,
    ViTConfig,
)
from vlm.losses import contrastive_loss
from vlm.models import DualEncoder, adapters, vision_tower
from vlm.models.towers import text_tower
from vlm.nn import Attention, ConvStem, Execution, MapPool, Mlp, Patches, QueryPool
from vlm.nn.intermediates import Intermediates
from vlm.nn.lora import AdapterParam

B, EMBED = 8, 8
BLOCKS = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
VIT = {"image_size": 16, "patch_size": 8, "projection": "linear", **BLOCKS}
TEXT = {"vocab_size": 48, "context_length": 8, "projection": "linear", **BLOCKS}
ENCODER = TEXT | {"head_dim": 8}
TOWERS = {
    "vit": ViTConfig(**VIT, pool="class", registers=1, patch_dropout=0.5, dropout=0.1),
    "map": ViTConfig(**VIT, pool="map"),
    "query": ViTConfig(**VIT, pool="query", stem="conv", stem_widths=(4, 8, 8)),
    "rotary": ViTConfig(**VIT, pool="mean", rotary=0, mlp="swiglu"),
    "nested": ViTConfig(**VIT, pool="class", stem="nested", stem_widths=(8, 8)),
    "naflex": ViTConfig(**VIT, pool="map", patch_dropout=0.5),
    "resnet": ResNetConfig(image_size=32, depths=(1, 1), width=8, heads=4),
    "convnext": ConvNeXtConfig(image_size=8, depths=(1, 1), widths=(4, 8), mlp_dims=(8, 16)),
    "vitamin": ViTaminConfig(16, 4, (4, 4), (1, 1), width=8, depth=1, heads=2, mlp_dim=8),
    "fastvit": FastViTConfig(
        4,
        (FastViTStage(1, 4, 8, halve=False), FastViTStage(1, 8, 16, heads=2, norm=True)),
        width=8,
        squeeze=4,
        image_size=16,
    ),
    "efficientnet": EfficientNetConfig(
        image_size=16,
        stem_width=4,
        stages=(EfficientNetStage(1, 4, expand=1, halve=False), EfficientNetStage(2, 8)),
    ),
    "swin": SwinConfig(16, (2, 2), (8, 16), (2, 2), (8, 8), window=3),
    "resnet_v1": ResNetV1Config(16, (1, 2), stem_width=16, pool="attention"),
    "mean": TextConfig(**TEXT, pool="mean", pad_id=0, dropout=0.1),
    "modernbert": EncoderTextConfig(**ENCODER, window=2, global_every=2, dropout=0.1),
    "t5": EncoderTextConfig(
        **ENCODER, positions="relative", buckets=8, max_distance=16, pool="mean"
    ),
    "end": TextConfig(**TEXT, pool="end", end_id=3, causal=True),
}
SHORT = ("vit", "end")  # of the tests that are not of every kind
ROWS = P(("data", "fsdp"))


@pytest.fixture(autouse=True)
def _all_parameters_are_sharded(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 1)


def make(name):
    config, options = TOWERS[name], {"execution": Execution(), "rngs": nnx.Rngs(0)}
    if isinstance(config, TextConfig | EncoderTextConfig):
        return text_tower(config, EMBED, **options)
    return vision_tower(config, EMBED, **options)


def inputs(name):
    rng = np.random.default_rng(0)
    if isinstance(TOWERS[name], TextConfig | EncoderTextConfig):
        tokens = rng.integers(4, 48, (B, 8)).astype(np.int32)
        tokens[:, 5:] = 3, 0, 0
        return jnp.asarray(tokens)
    if name == "naflex":
        grid = rng.dirichlet(np.ones(2), (2, B, 6)).astype(np.float32)
        mask = np.arange(6) < rng.integers(3, 7, (B, 1))
        arrays = rng.normal(size=(B, 6, 64, 3)).astype(np.float32), *grid, mask
        return Patches(*map(jnp.asarray, arrays))
    size = TOWERS[name].image_size
    return jnp.asarray(rng.normal(size=(B, size, size, 3)), jnp.float32)


KEYS = jax.random.split(jax.random.key(1), B)


def squares(graph, method="__call__", **options):
    """A loss of a tower's parameters and inputs."""

    def loss(state, x, keys):
        used = options | ({} if keys is None else {"keys": keys})
        z = getattr(nnx.merge(graph, state), method)(x, **used)
        return jnp.square(z.astype(jnp.float32)).mean(), z

    return loss


def with_gradients(loss):
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def close(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1, np.abs(other).max()))


def explicit():
    return jax.make_mesh((2, 2, 2), sharding.AXES)


def rows_on(mesh, tree, spec=ROWS):
    return jax.device_put(tree, NamedSharding(mesh, spec))


# -------------------------------------------------------------------------------- every kind


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_on_explicit_axes_with_sharded_parameters(name):
    mesh, x = explicit(), inputs(name)
    graph, state = nnx.split(make(name))
    program = with_gradients(squares(graph))
    wanted = program(state, x, KEYS)
    with jax.set_mesh(mesh):
        placed = jax.device_put(state, sharding.shardings(state, mesh))
        found = program(placed, rows_on(mesh, x), rows_on(mesh, KEYS))
    close(found, wanted)
    (_, z), gradients = found
    assert z.sharding.spec == P(("data", "fsdp"), None)
    types = [jax.tree.map(jax.typeof, nnx.to_pure_dict(tree)) for tree in (gradients, placed)]
    assert types[0] == types[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_in_a_shard_map(name):
    mesh, x = jax.make_mesh((8,), ("batch",)), inputs(name)
    graph, state = nnx.split(make(name))

    def local(state, x, keys):
        def loss(state):
            value, z = squares(graph)(state, x, keys)
            return jax.lax.pmean(value, "batch"), z

        return jax.value_and_grad(loss, has_aux=True)(state)

    wanted = with_gradients(squares(graph))(state, x, KEYS)
    rows = P("batch")
    with jax.set_mesh(mesh):
        program = jax.shard_map(local, in_specs=(P(), rows, rows), out_specs=((P(), rows), P()))
        placed = rows_on(mesh, state, P())
        try:
            found = jax.jit(program)(placed, rows_on(mesh, x, rows), rows_on(mesh, KEYS, rows))
        except ValueError as error:
            if "Primitive polynomial" in str(error):
                pytest.skip("JAX 0.12.0 cannot differentiate lax.erf in a checked shard_map")
            raise
    close(found, wanted)


# ----------------------------------------------------------------------------------- the rest


@pytest.mark.slow
@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", SHORT)
def test_a_tower_under_vmap(name, types):
    """Over examples, and over an ensemble of parameters."""
    mesh, x = jax.make_mesh((8,), ("batch",), axis_types=(types,)), inputs(name)
    graph, state = nnx.split(make(name))
    z = nnx.merge(graph, state)(x)
    with jax.set_mesh(mesh):
        placed, state = rows_on(mesh, x, P("batch")), rows_on(mesh, state, P())
        one = jax.vmap(lambda x: nnx.merge(graph, state)(x[None])[0])
        close(jax.jit(one)(placed), z)
        pair = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), state)
        many = jax.jit(jax.vmap(lambda s, x: nnx.merge(graph, s)(x), (0, None)))(pair, placed)
    close(many[0], z)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "map", "resnet"])
def test_dense_embeddings_on_explicit_axes(name):
    mesh, x = explicit(), inputs(name)
    graph, state = nnx.split(make(name))
    wanted = with_gradients(squares(graph, "dense"))(state, x, None)
    with jax.set_mesh(mesh):
        found = with_gradients(squares(graph, "dense"))(state, rows_on(mesh, x), None)
    close(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["map", "end"])
def test_intermediates_on_explicit_axes(name):
    """Captured and changed: the gradient by a change of zeros is that by the activation."""
    mesh, tower, x = explicit(), make(name), inputs(name)

    def run(changes, x):
        intermediates = Intermediates(changes)
        z = tower(x, intermediates=intermediates)
        return jnp.square(z).mean(), intermediates.found

    zeros = jax.tree.map(jnp.zeros_like, run({}, x)[1])
    wanted = jax.value_and_grad(run, has_aux=True)(zeros, x)
    with jax.set_mesh(mesh):
        found = with_gradients(run)(zeros, rows_on(mesh, x))
    close(found, wanted)
    captured = found[0][1]
    assert captured["blocks/output"].sharding.spec[:2] == (None, ("data", "fsdp"))
    assert all(P(*a.sharding.spec) != P() for a in captured.values())


@pytest.mark.slow
def test_layers_on_explicit_axes():
    mesh, options = explicit(), {"dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    x, images = jnp.ones((B, 5, 16)), jnp.ones((B, 8, 8, 3))
    layers = [
        (Attention(16, 2, **options), x),
        (Mlp(16, 32, "gelu", **options), x),
        (MapPool(16, 2, 32, act="gelu", norm_eps=1e-6, **options), x),
        (QueryPool(16, 8, 2, norm_eps=1e-6, **options), x),
        (ConvStem((4, 8), 16, **options), images),
    ]
    for layer, x in layers:
        wanted = layer(x)
        with jax.set_mesh(mesh):
            found = jax.jit(lambda x, layer=layer: layer(x))(rows_on(mesh, x))
        close(found, wanted)
        assert found.sharding.spec[0] == ("data", "fsdp")


MODEL = ModelConfig(ViTConfig(**VIT, pool="mean"), TextConfig(**TEXT, pool="mean"), embed_dim=EMBED)
IMAGES, TOKENS = inputs("vit"), inputs("end")


def pair_loss(model, images, tokens, mesh=None):
    z_image, z_text = model(images, tokens)
    return contrastive_loss(z_image, z_text, model.logit_scale[...], kind="softmax", mesh=mesh)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, "lora", "dora", "int8"])
def test_a_dual_encoder_with_its_loss_on_explicit_axes(adapter):
    mesh, model = explicit(), DualEncoder(MODEL, rngs=nnx.Rngs(0))
    if adapter is not None:
        options = {"lora": {}, "dora": {"dora": True}, "int8": {"quantize": "int8"}}[adapter]
        config = AdapterConfig(rank=2, **options)
        model = adapters.prepared(model, config, 0)
    graph, trained, rest = nnx.split(model, AdapterParam if adapter else nnx.Param, ...)

    def loss(trained, rest, images, tokens):
        return pair_loss(nnx.merge(graph, trained, rest), images, tokens)

    program = jax.jit(jax.value_and_grad(loss))
    wanted = program(trained, rest, IMAGES, TOKENS)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(s, sharding.shardings(s, mesh)) for s in (trained, rest)]
        close(program(*placed, rows_on(mesh, IMAGES), rows_on(mesh, TOKENS)), wanted)


class Judge(nnx.Module):
    """A user's model around a vlm tower."""

    def __init__(self, tower, rngs):
        self.tower = tower
        self.head = nnx.Linear(EMBED, 2, rngs=rngs)

    def __call__(self, images):
        return self.head(self.tower(images))


@pytest.mark.slow
@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_a_tower_trains_inside_another_model(types):
    """`nnx.jit`, `nnx.value_and_grad` and `nnx.Optimizer`, as without a mesh."""
    labels = np.arange(B) % 2

    def losses(images, labels):
        model = Judge(make("map"), nnx.Rngs(1))
        optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, images, labels):
            def loss(model):
                logits = model(images)
                return optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, 2)).mean()

            value, gradients = nnx.value_and_grad(loss)(model)
            optimizer.update(model, gradients)
            return value

        return [float(step(model, optimizer, images, labels)) for _ in range(3)]

    wanted = losses(IMAGES, labels)
    assert wanted[-1] < wanted[0]
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(types,))
    with jax.set_mesh(mesh):
        found = losses(rows_on(mesh, IMAGES, P("batch")), rows_on(mesh, labels, P("batch")))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.first_tier
def test_a_step_of_the_users_own_on_the_default_mesh():
    """One program: explicit axes, a text tower and its gradient."""
    mesh = jax.make_mesh((8,), ("batch",))
    graph, state = nnx.split(make("end"))
    wanted = with_gradients(squares(graph))(state, TOKENS, None)
    with jax.set_mesh(mesh):
        placed = rows_on(mesh, TOKENS, P("batch"))
        close(with_gradients(squares(graph))(state, placed, None), wanted)
