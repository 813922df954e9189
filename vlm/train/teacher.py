"""The teacher of a distillation: a frozen model that embeds every batch beside the student."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from vlm import bundle
from vlm.config import Experiment
from vlm.data.reinforced import Reinforced
from vlm.errors import ConfigError
from vlm.sharding import batch_sharding
from vlm.train.resolution import shrink


class Teacher:
    """Embeddings of a batch by another model, whose parameters lie on the run's mesh.

    It sees the student's own pixels, augmented as they are, at its own size; and the same texts, in
    its own tokens.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: a teacher whose features the student cannot be compared with.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh):
        config = experiment.distill
        assert config is not None
        self._bundle = bundle.load(config.teacher, mesh=mesh if mesh.size > 1 else None)
        self.width, self.tokenizer = self._bundle.embed_dim, self._bundle.tokenizer
        inputs = self._bundle.preprocess.config
        if inputs.resize == "naflex":
            raise ConfigError(
                f"distill.teacher {config.teacher!r} takes images of any aspect (NaFlex), and "
                "training makes square ones: give a teacher of one size"
            )
        _check_width(experiment, self.width)
        self.log_scale = _log_scale(experiment, math.log(self._bundle.logit_scale))
        self._size = inputs.image_size
        rows = experiment.micro_batch_size or experiment.batch_size
        self._parts = experiment.batch_size // rows
        graph, self._state = nnx.split(self._bundle.model)
        sharding = batch_sharding(mesh)

        def embed(state, images, tokens):
            model = nnx.merge(graph, state)

            def one(part):
                return self._embed(model, *part)

            if self._parts == 1:
                return one((images, tokens))
            # Every k-th row to the same part: the sharded axis stays whole on its devices.
            cut = jax.tree.map(
                lambda x: x.reshape(rows, self._parts, *x.shape[1:]).swapaxes(0, 1),
                (images, tokens),
            )
            z = jax.lax.map(one, cut)
            return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, x.shape[-1]), z)

        self._program = jax.jit(embed, out_shardings=(sharding, sharding))

    def __call__(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The batch, global, with the teacher's unit-norm embeddings in place of its tokens."""
        batch = dict(batch)
        tokens = batch.pop("teacher_tokens")
        z_image, z_text = self._program(self._state, batch["images"], tokens)
        return batch | {"teacher_image": z_image, "teacher_text": z_text}

    def _embed(
        self, model, images: UInt8[Array, "b h w 3"], tokens: Int[Array, "b l"]
    ) -> tuple[Float[Array, "b e"], Float[Array, "b e"]]:
        pixels = images.astype(jnp.float32)
        if pixels.shape[1] != self._size:
            pixels = shrink(pixels, self._size)
        pixels = self._bundle.preprocess.normalize(pixels)
        return model.encode_image(pixels), model.encode_text(tokens)


class StoredTeacher:
    """A teacher that has spoken: its embeddings come with the batch.

    Raises:
        DataError: they are not there.
        ConfigError: a teacher whose features the student cannot be compared with.
    """

    def __init__(self, experiment: Experiment):
        assert experiment.distill is not None
        assert experiment.distill.stored is not None
        self.embeddings = Reinforced.open(experiment.distill.stored)
        self.width = self.embeddings.width
        _check_width(experiment, self.width)
        self.log_scale = _log_scale(experiment, self.embeddings.log_scale)

    def __call__(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The batch as it is."""
        return batch


def _check_width(e: Experiment, width: int) -> None:
    config, ours = e.distill, e.model.embed_dim
    assert config is not None
    if config.features and width != ours and not config.projection:
        raise ConfigError(
            f"the teacher {config.teacher or config.stored!r} has embeddings of {width} dimensions "
            f"and the student of {ours}: set distill.projection to learn a layer between them, or "
            "distill.features to 0"
        )


def _log_scale(e: Experiment, own: float) -> float:
    assert e.distill is not None
    return own if e.distill.temperature is None else -math.log(e.distill.temperature)
