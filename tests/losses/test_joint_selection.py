"""Joint example selection against the definition in numpy, and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm.config import MeshConfig
from vlm.errors import ConfigError, ShardingError
from vlm.losses.joint_selection import ScoredEmbeddings, select_jointly
from vlm.sharding import batch_sharding, make_mesh

SCALE, BIAS = 8.0, -4.0


def unit(random, shape):
    x = random.normal(size=shape)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def made(total: int, seed: int = 0, kind: str = "sigmoid") -> list[ScoredEmbeddings]:
    """A learner of width 8 and a reference of width 12, on pairs of which a third are wrong."""
    random = np.random.default_rng(seed)
    models = []
    for weight, width, noise in ((1.0, 8, 1.0), (-1.0, 12, 0.3)):
        x = unit(random, (total, width))
        y = x + noise * random.normal(size=x.shape)
        y[: total // 3] = np.roll(y[: total // 3], 1, axis=0)
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        bias = None if kind == "softmax" else jnp.float32(BIAS)
        x, y = (jnp.asarray(z, jnp.float32) for z in (x, y))
        models.append(ScoredEmbeddings(weight, x, y, jnp.log(SCALE), bias))
    return models


def total_loss(model: ScoredEmbeddings, rows: list[int], kind: str) -> float:
    """The size of a batch times its contrastive loss, from its matrix of logits in float64."""
    x, y = (np.asarray(z, np.float64)[rows] for z in (model.z_image, model.z_text))
    logits = np.exp(float(model.logit_scale)) * x @ y.T
    if kind == "sigmoid":
        assert model.logit_bias is not None
        signs = 2 * np.eye(len(rows)) - 1
        return np.logaddexp(0, -signs * (logits + float(model.logit_bias))).sum()
    own = np.diagonal(logits)
    rows_and_columns = (np.log(np.exp(logits).sum(axis)) for axis in (0, 1))
    return sum((z - own).sum() for z in rows_and_columns) / 2


def by_definition(key, models, count: int, chunks: int, kind: str) -> list[int]:
    """Algorithm 1 of the paper, with a loss of the whole batch for every candidate."""
    total = len(models[0].z_image)
    noise = np.asarray(jax.random.gumbel(key, (chunks, total), jnp.float32))

    def score(rows):
        return sum(m.weight * total_loss(m, rows, kind) for m in models) if rows else 0.0

    chosen: list[int] = []
    for row in noise:
        left = [i for i in range(total) if i not in chosen]
        scores = np.array([score([*chosen, i]) - score(chosen) for i in left]) + row[left]
        best = np.argsort(-scores, kind="stable")[: count // chunks]
        chosen += [left[i] for i in best]
    return sorted(chosen)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("count", "chunks"), [(12, 4), (8, 8), (12, 1), (36, 3)])
def test_the_chosen_pairs_are_those_of_the_definition(kind, count, chunks):
    for seed in range(3):
        key, models = jax.random.key(seed), made(36, seed, kind)
        found = select_jointly(key, models, count, chunks=chunks, kind=kind, tile=5)
        assert found.tolist() == by_definition(key, models, count, chunks, kind)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_one_model_alone_scores_by_its_loss(kind):
    learner, reference = made(24, 3, kind)
    for model in (learner, reference):
        key = jax.random.key(7)
        found = select_jointly(key, [model], 6, chunks=3, kind=kind)
        assert found.tolist() == by_definition(key, [model], 6, 3, kind)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_eight_devices_choose_the_same_pairs_as_one(kind):
    models, key = made(64, 1, kind), jax.random.key(2)
    alone = select_jointly(key, models, 16, chunks=4, kind=kind)
    for shape in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)):
        mesh = make_mesh(shape, jax.devices()[:8])
        rows = batch_sharding(mesh)
        spread = jax.device_put([(m.z_image, m.z_text) for m in models], rows)

        @jax.jit
        def choose(spread, mesh=mesh):
            pairs = zip(models, spread, strict=True)
            found = [m._replace(z_image=x, z_text=y) for m, (x, y) in pairs]
            return select_jointly(key, found, 16, chunks=4, kind=kind, mesh=mesh)

        assert choose(spread).tolist() == alone.tolist()


def test_pairs_with_wrong_texts_are_left_out_by_learnability():
    """A learner at chance and a good reference: the score is minus the reference's loss."""
    random = np.random.default_rng(0)
    z = jnp.asarray(unit(random, (90, 16)), jnp.float32)
    wrong = z.at[:30].set(jnp.roll(z[:30], 1, axis=0))
    same = jnp.ones_like(z) / 4
    models = [
        ScoredEmbeddings(1.0, same, same, jnp.log(1.0)),
        ScoredEmbeddings(-1.0, z, wrong, jnp.log(20.0)),
    ]
    found = select_jointly(jax.random.key(0), models, 30, chunks=10, kind="softmax")
    assert (found < 30).sum() <= 4  # the first chunk of the softmax loss is uniform
    biased = [m._replace(logit_bias=jnp.float32(-10.0)) for m in models]
    found = select_jointly(jax.random.key(0), biased, 30, chunks=10, kind="sigmoid")
    assert (found < 30).sum() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 7}, "7 of 24 pairs cannot be chosen in 2 chunks"),
        ({"count": 26}, "26 of 24 pairs cannot be chosen"),
        pytest.param(
            {"kind": "triplet"},
            "there is no 'triplet' loss: choose one of softmax, sigmoid",
            marks=pytest.mark.untyped,
        ),
        ({"models": []}, "needs the embeddings of a learner or a reference"),
    ],
)
def test_bad_input_is_refused(options, message):
    given = {"models": made(24), "count": 4, "chunks": 2, "kind": "sigmoid"} | options
    with pytest.raises(ConfigError, match=message):
        select_jointly(jax.random.key(0), given.pop("models"), given.pop("count"), **given)


def test_models_of_other_pairs_and_uneven_shards_are_refused():
    one, other = made(24)[0], made(20)[1]
    with pytest.raises(ConfigError, match="super-batches of 24, 20 pairs"):
        select_jointly(jax.random.key(0), [one, other], 4, chunks=2, kind="sigmoid")
    mesh = make_mesh(MeshConfig(), jax.devices()[:8])
    with pytest.raises(ShardingError, match="a batch of 20 does not divide"):
        select_jointly(jax.random.key(0), [other], 4, chunks=2, kind="sigmoid", mesh=mesh)
