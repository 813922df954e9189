"""Teacher of a distillation: a frozen model that embeds every batch, or stored embeddings.

It is also the reference of a selection, and then embeds every super-batch.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from vlm import bundle
from vlm.config import Experiment, ModelConfig, absence
from vlm.data.reinforced import Reinforced
from vlm.errors import ConfigError
from vlm.inputs.preprocess import Preprocess
from vlm.losses.cached import join_batch, split_batch
from vlm.models.flops import Supervision
from vlm.sharding import batch_sharding, placed, shardings
from vlm.training.resolution import shrink
from vlm.weights.instantiate import abstract_model
from vlm.weights.registry import describe
from vlm.weights.resolution import at_context_length, at_image_size


def teacher_source(e: Experiment) -> tuple[str, str | None]:
    """Return the model that teaches or selects, and the folder of stored embeddings in its place.

    Without a teacher both are empty.
    """
    if e.distill is not None:
        return e.distill.teacher, e.distill.stored
    if e.selection is not None:
        return e.selection.reference, e.selection.stored
    return "", None


class Teacher:
    """Online teacher: a frozen model on the run's mesh that embeds each batch.

    Its inputs are the student's augmented images, resized to its own size, and the same texts,
    tokenised by its own tokenizer.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: the teacher's inputs or embedding width do not suit the student.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh):
        name, _ = teacher_source(experiment)
        model = bundle.load(name, mesh=mesh if mesh.size > 1 else None)
        self.config: ModelConfig | None = model.config
        _check_towers(model.config, model.name)
        self.width, self.tokenizer = model.embed_dim, model.tokenizer
        _check(experiment, self.width, model.preprocess)
        self.own_log_scale = math.log(model.logit_scale)
        self.logit_bias = None if model.config.init_bias is None else model.logit_bias
        self.log_scale = _log_scale(experiment, self.own_log_scale)
        _check_bias(experiment, self.logit_bias)
        graph, self._state = nnx.split(model.model)
        self._program = _program(graph, model.preprocess, experiment, mesh)

    def __call__(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Replace the teacher's tokens in a global batch by its unit-norm embeddings."""
        batch = dict(batch)
        tokens = batch.pop("teacher_tokens")
        z_image, z_text = self._program(self._state, batch["images"], tokens)
        return batch | {"teacher_image": z_image, "teacher_text": z_text}


class StoredTeacher:
    """Precomputed teacher: its embeddings are read with the batch.

    Raises:
        DataError: there are no stored embeddings.
        ConfigError: their width does not suit the student.
    """

    config: ModelConfig | None = None

    def __init__(self, experiment: Experiment):
        _, stored = teacher_source(experiment)
        assert stored is not None
        self.embeddings = Reinforced.open(stored)
        self.width = self.embeddings.width
        _check(experiment, self.width)
        self.own_log_scale = self.embeddings.log_scale
        self.logit_bias = self.embeddings.logit_bias
        self.log_scale = _log_scale(experiment, self.own_log_scale)
        _check_bias(experiment, self.logit_bias)

    def __call__(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Return the batch unchanged: it has the embeddings."""
        return batch


class DescribedTeacher:
    """Teacher without weights, for plans.

    Attributes:
        parameters: shapes of the parameters, without those of an adapter.

    Raises:
        CheckpointError, ConfigError: as `Teacher`.
    """

    log_scale = own_log_scale = 0.0  # no shape depends on it

    def __init__(self, experiment: Experiment):
        name, _ = teacher_source(experiment)
        checkpoint, size, length = describe(name)
        _check_towers(checkpoint.config, checkpoint.name)
        config, pixels = at_image_size(checkpoint.config, checkpoint.preprocess, size)
        positions = checkpoint.text_positions
        self.config, _ = at_context_length(config, checkpoint.tokenizer, length, positions)
        self.width, self._experiment = self.config.embed_dim, experiment
        self._preprocess = Preprocess(pixels)
        _check(experiment, self.width, self._preprocess)
        self.logit_bias = self.config.init_bias
        _check_bias(experiment, self.logit_bias)
        self._graph, self.parameters = nnx.split(abstract_model(self.config, jnp.float32))

    def trace(self, mesh: Mesh) -> Any:
        """Trace the program of `Teacher` for a mesh, whose devices need not exist."""

        e, rows = self._experiment, batch_sharding(mesh)
        size, length = e.model.vision.image_size, self.config.text.context_length
        count = e.super_batch_size
        images = placed(jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8), rows)
        tokens = placed(jax.ShapeDtypeStruct((count, length), jnp.int32), rows)
        state = jax.tree.map(
            placed, self.parameters, shardings(self.parameters, mesh, self.config.partition)
        )
        return _program(self._graph, self._preprocess, e, mesh).trace(state, images, tokens)


AnyTeacher = Teacher | StoredTeacher | DescribedTeacher


def supervision_of(classes: int, teacher: AnyTeacher | None) -> Supervision:
    """Describe the extra supervision of a run, for its FLOP count."""
    if teacher is None:
        return Supervision(classes)
    return Supervision(classes, teacher.width, teacher.config)


def _program(graph: Any, preprocess: Preprocess, experiment: Experiment, mesh: Mesh) -> Any:
    """Make the jitted encoder of (parameters, images, tokens), which runs in micro-batches."""
    parts = experiment.super_batch_size // (experiment.micro_batch_size or experiment.batch_size)
    sharding, size = batch_sharding(mesh), preprocess.config.image_size

    @functools.partial(jax.jit, out_shardings=(sharding, sharding))
    def embed(state, images, tokens):
        model = nnx.merge(graph, state)

        def embed_part(
            part: tuple[UInt8[Array, "b h w 3"], Int[Array, "b l"]],
        ) -> tuple[Float[Array, "b e"], Float[Array, "b e"]]:
            images, tokens = part
            pixels = images.astype(jnp.float32)
            pixels = pixels if pixels.shape[1] == size else shrink(pixels, size)
            return model.encode_image(preprocess.normalize(pixels)), model.encode_text(tokens)

        if parts == 1:
            return embed_part((images, tokens))
        return join_batch(jax.lax.map(embed_part, split_batch((images, tokens), parts)))

    return embed


def check_square(teacher: str, preprocess: Preprocess) -> None:
    """Raise a ConfigError if a teacher does not take square images."""
    if preprocess.config.resize == "naflex":
        raise ConfigError(
            f"the teacher {teacher!r} takes images of any aspect (NaFlex), and distillation "
            "and selection use square images: choose a teacher with square images"
        )


def _check(e: Experiment, width: int, preprocess: Preprocess | None = None) -> None:
    """Raise a ConfigError if the teacher's inputs or width do not suit the student."""
    config, ours = e.distill, e.model.embed_dim
    name, stored = teacher_source(e)
    if preprocess is not None:
        check_square(name, preprocess)
    if config is not None and config.features and width != ours and not config.projection:
        raise ConfigError(
            f"the teacher {name or stored!r} has embeddings of {width} dimensions "
            f"and the student of {ours}: set distill.projection to learn a projection between "
            "them, or distill.features to 0"
        )


def _check_towers(config: ModelConfig, name: str) -> None:
    """Raise a ConfigError if the teacher has one tower alone, or several vectors of an image."""
    towers: tuple[Literal["vision", "text"], ...] = ("vision", "text")
    for tower in towers:
        if getattr(config, tower).kind == "none":
            raise ConfigError(absence(tower, getattr(config, tower), name))
    if config.vision.vectors > 1:
        raise ConfigError(
            f"the teacher {name} makes several vectors of an image: choose one with one vector"
        )


def _check_bias(e: Experiment, bias: float | None) -> None:
    """Raise a ConfigError if a selection by the sigmoid loss has a reference without a bias."""
    selection, (name, stored) = e.selection, teacher_source(e)
    if selection is None or selection.score == "hard_learner" or e.model.loss != "sigmoid":
        return
    if bias is None:
        raise ConfigError(
            f"selection scores by the sigmoid loss of the model, which needs a logit bias, and the "
            f"reference {name or stored!r} has none: choose a reference that was trained with the "
            'sigmoid loss (stored embeddings: written by this version), or model.loss "softmax"'
        )


def _log_scale(e: Experiment, own: float) -> float:
    config = e.distill
    if config is None or config.temperature is None:
        return own
    return -math.log(config.temperature)
