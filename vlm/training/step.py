"""One training step: a jitted, sharded pure function of (state, batch) that donates the state."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from vlm._deprecation import renamed_method
from vlm.config import Code, Experiment, TokenizerConfig
from vlm.config.defaults import with_defaults
from vlm.errors import ConfigError, check_choice
from vlm.inputs.preprocess import Preprocess
from vlm.losses.cached import cached_embed, join_batch, split_batch
from vlm.models import adapters
from vlm.models.dual_encoder import DualEncoder
from vlm.models.float8 import in_float8
from vlm.models.flops import Supervision
from vlm.models.modules import constants
from vlm.models.trained import is_frozen, is_trained
from vlm.nn.fsdp import (
    Dimensions,
    fsdp_dimensions,
    gather_parameters,
    maps_batch,
    per_batch_shard,
)
from vlm.nn.layers import split_keys
from vlm.nn.naflex import Patches
from vlm.nn.transformer import Execution, gather_layers
from vlm.sharding import (
    batch_sharding,
    batch_ways,
    global_batch,
    placed,
    platform_of,
    replicated,
    shardings,
)
from vlm.training.compiler_options import compiler_options, scans_blocks
from vlm.training.masking import mask_tokens
from vlm.training.objectives import (
    HEADS,
    UNTRAINED,
    Embeddings,
    embeddings,
    objective,
    whole_tokens,
)
from vlm.training.optimizer import learning_rate, make_optimizer, own_learning_rate
from vlm.training.parameter_masks import check_patterns
from vlm.training.partition import Params, joined, partition
from vlm.training.resolution import shrink, with_grid
from vlm.training.selection import select_batch
from vlm.training.teacher import AnyTeacher, DescribedTeacher, supervision_of

_PROJECTIONS = 2  # folded into the seed's key
_LOSSES = 3  # folded into a step's key, for losses of the user
_SELECTION = 4  # folded into a step's key, for the selection of its batch
_MASKING = 1  # folded into an example's key for its text mask: independent of the towers' keys


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """State that a step updates and a checkpoint stores.

    Example:
        >>> mesh = vlm.sharding.make_mesh(vlm.MeshConfig())
        >>> trainer = vlm.training.Trainer(experiment, mesh)
        >>> trainer.abstract_state.params["vision"]["position"].shape
        (4, 16)
    """

    # The fields hold arrays, shapes of arrays, or shardings.
    step: Any  # Int[Array, ""]
    total_steps: Any  # Int[Array, ""]
    params: Any  # Params: trained
    frozen: Any  # Params: the rest of the model, without gradient and optimizer state
    opt_state: Any
    ema: Any  # Params | None
    skipped: Any  # Int[Array, ""]: steps whose loss or gradient was not finite


class Trainer:
    """Jitted functions of a run: `init`, `step`, `embed_images`, `embed_texts`.

    The module's graph is split from its parameters once, here; the functions take plain trees.
    `step` has compiler options of its own, so another jitted function cannot call it.

    Example:
        >>> mesh = vlm.sharding.make_mesh(vlm.MeshConfig())
        >>> trainer = vlm.training.Trainer(experiment, mesh)
        >>> state = trainer.init(jnp.int32(100))
        >>> int(state.step), int(state.total_steps)
        (0, 100)
    """

    def __init__(
        self,
        experiment: Experiment,
        mesh: Mesh | AbstractMesh,
        rules: TokenizerConfig | None = None,
        classes: int = 0,
        teacher: AnyTeacher | None = None,
    ):
        self.experiment = experiment = with_defaults(experiment)
        self.mesh = mesh
        self.rules = rules or experiment.tokenizer  # ids of padding, begin and end tokens
        self.classes = classes  # of the classification head
        self.teacher = teacher
        # First step of the learning rate schedule, and the step at its end (None: of the run).
        self.schedule_span: tuple[int, int | None] = (0, None)
        self.scan = scans_blocks(experiment, platform_of(mesh))
        self.preprocess = Preprocess(experiment.preprocess)
        self.optimizer = make_optimizer(experiment.optimizer)
        model = nnx.eval_shape(self._build)
        self.graph, self.constants = nnx.graphdef(model), constants(model)
        self.abstract_state = jax.eval_shape(self._init, jnp.int32(1))
        self._check_patterns()
        self.state_shardings = shardings(self.abstract_state, mesh, experiment.model.partition)
        self.step_graph, self.gathered_at_once = self._for_training(model)
        replicated_sharding = replicated(mesh)
        self.init = jax.jit(self._init, out_shardings=self.state_shardings)
        self.step_at = functools.cache(self._step_at)  # freed with the trainer
        self.step = self.step_at(experiment.model.vision.image_size)
        self.embed_images = jax.jit(self._embed_images, out_shardings=replicated_sharding)
        self.embed_texts = jax.jit(self._embed_texts, out_shardings=replicated_sharding)
        self.head = jax.jit(
            self._head, out_shardings=replicated_sharding
        )  # (m, d), in a classification

    def _for_training(self, model: DualEncoder) -> tuple[nnx.GraphDef, Dimensions]:
        """Return the graph of `model` in a step, and the parameters to gather before it runs.

        The model is evaluated and exported without float8. Where the towers get parameters that are
        sharded over `fsdp`, the layers of a transformer gather their own and sum their gradients.
        With micro-batches all are gathered once, and gradients are summed once.
        """
        if self.experiment.matmul_dtype == "float8":
            model = in_float8(model)
        specs = self._parameter_specs()
        dimensions = fsdp_dimensions(joined(*specs)) if maps_batch(self.mesh) else {}
        once = self.experiment.gathers_once
        layers = set() if once else gather_layers(model, dimensions)
        return nnx.graphdef(model), {p: d for p, d in dimensions.items() if p not in layers}

    def _parameter_specs(self) -> tuple[Params, Params]:
        """Return how the towers get trained and frozen parameters: shards over `fsdp` alone."""

        def spec(sharding):
            return PartitionSpec(*(axis if axis == "fsdp" else None for axis in sharding.spec))

        return jax.tree.map(spec, (self.state_shardings.params, self.state_shardings.frozen))

    @property
    def supervision(self) -> Supervision:
        """Return the extra supervision of the run, for its FLOP count."""
        return supervision_of(self.classes, self.teacher)

    # ------------------------------------------------------------------------ the step

    def place(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make global arrays of this process's batch, with the teacher's embeddings."""
        placed = global_batch(batch, self.mesh)
        assert not isinstance(self.teacher, DescribedTeacher)  # it has no weights
        return placed if self.teacher is None else self.teacher(placed)

    def _step_at(self, image_size: int):
        """Return `step` for images shrunk to `image_size` pixels: one program for each size."""
        replicated_sharding = replicated(self.mesh)
        return jax.jit(
            functools.partial(self._step, image_size=image_size),
            in_shardings=(self.state_shardings, batch_sharding(self.mesh)),
            out_shardings=(self.state_shardings, replicated_sharding),
            donate_argnums=0,
            compiler_options=compiler_options(self.mesh, compute_dtype(self.experiment.dtype)),
        )

    def _step(
        self, state: TrainState, batch: dict[str, Any], *, image_size: int
    ) -> tuple[TrainState, dict]:
        """Return the state after one step, and its metrics."""
        config = self.experiment.optimizer
        key = jax.random.fold_in(jax.random.key(self.experiment.seed), state.step)
        batch, selected = self._select(state, batch, key, image_size)
        (loss, terms), grads = self._value_and_grad(state, batch, key, image_size)

        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        first, end = self.schedule_span
        steps = (state.total_steps if end is None else end) - first
        rate = learning_rate(config, (state.step - first) / steps, steps)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        if config.max_scale is not None and "logit_scale" in params:
            # A scale that starts above the limit is not clipped, but cannot rise.
            limit = jnp.maximum(jnp.log(config.max_scale), state.params["logit_scale"])
            params["logit_scale"] = jnp.minimum(params["logit_scale"], limit)
        ema = self._average(state.ema, params, state.step)

        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        after = TrainState(
            step=state.step + 1,
            total_steps=state.total_steps,
            params=_where(finite, params, state.params),
            frozen=state.frozen,
            opt_state=_where(finite, opt_state, state.opt_state),
            ema=_where(finite, ema, state.ema),
            skipped=state.skipped + ~finite,
        )
        model = joined(after.params, after.frozen)
        metrics = {
            "loss": loss,
            **terms,
            **selected,
            "scale": jnp.exp(model["logit_scale"]),
            "grad_norm": grad_norm,
            "finite": finite,
            "tokens": jnp.float32(self.tokens_per_step(image_size, batch)),
        }
        own_rate = own_learning_rate(config, opt_state)
        if config.transformation is None or own_rate is not None:
            metrics["learning_rate"] = rate if own_rate is None else own_rate
        if "logit_bias" in model:
            metrics["bias"] = model["logit_bias"]
        for tower in ("vision", "text"):
            if tower in grads:
                metrics[f"grad_norm_{tower}"] = optax.tree.norm(grads[tower])
                metrics[f"param_norm_{tower}"] = optax.tree.norm(after.params[tower])
        return after, metrics

    def _value_and_grad(
        self, state: TrainState, batch: dict, key: Key[Array, ""], size: int
    ) -> tuple[tuple[Array, dict[str, Array]], Params]:
        """Compute ((loss, metrics), gradient) of the batch, in micro-batches if configured."""
        e, scale = self.experiment, self.teacher.log_scale if self.teacher else 0.0
        count = _rows(batch["images"])
        keys = jax.random.split(key, count)  # of each example, for dropout and patch dropout
        if "rows" in batch:  # sorted by the lengths of the texts
            keys = keys[batch["rows"]]

        ways = batch_ways(self.mesh)
        ways_in_towers = 1 if maps_batch(self.mesh) else ways

        def embed(params, batch, keys):
            return self._embed(params, batch, keys, size, ways_in_towers)

        def embed_all(params, batch, keys):
            params = gather_parameters(joined(*params), self.gathered_at_once)
            if not e.in_parts:
                return embed(params, batch, keys)
            assert e.micro_batch_size is not None
            parts = split_batch((batch, keys), e.batch_size // e.micro_batch_size)
            return join_batch(cached_embed(embed)(params, *parts))

        towers = per_batch_shard(embed_all, self.mesh, self._parameter_specs())

        def loss(params):
            z = towers((params, state.frozen), batch, keys)
            params, loss_key = joined(params, state.frozen), jax.random.fold_in(key, _LOSSES)
            of_loss, tokens = batch, batch["tokens"]
            if e.losses and isinstance(tokens, tuple):
                length = e.model.text.context_length
                of_loss = batch | {"tokens": whole_tokens(tokens, ways, length, self.rules.pad_id)}
            return objective(e, self.mesh, params, of_loss, z, loss_key, scale)

        return jax.value_and_grad(loss, has_aux=True)(state.params)

    def _embed(
        self, params: Params, batch: dict, keys: Key[Array, " b"] | None, size: int, ways: int
    ) -> Embeddings:
        """Embed pairs whose rows are on `ways` devices; without keys, nothing is dropped."""
        e = self.experiment
        images = self.preprocess.normalize(batch["images"])
        if size != e.model.vision.image_size:
            images = shrink(images, size)
            params["vision"] = with_grid(params["vision"], size // e.model.vision.patch_size)
        model = self._model(params, self.graph if keys is None else self.step_graph)
        if e.objective == "classification":
            image_keys, _ = split_keys(keys)
            return Embeddings(model.encode_image(images, keys=image_keys))
        tokens, names = batch["tokens"], e.loss_intermediates
        if keys is None:
            names = ()
        elif e.text_masking:
            mask_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, _MASKING)
            tokens = mask_tokens(tokens, e.text_masking, mask_keys, self.rules)
        return embeddings(model, images, tokens, keys, names, ways)

    def _select(
        self, state: TrainState, batch: dict, key: Key[Array, ""], size: int
    ) -> tuple[dict, dict[str, Array]]:
        """Choose the batch from a super-batch, if the experiment has a selection."""
        e = self.experiment
        if e.selection is None:
            return batch, {}

        def embed(part: dict) -> tuple[Array, Array]:
            params = joined(state.params, state.frozen)
            z = self._embed(params, part, None, size, batch_ways(self.mesh))
            assert z.text is not None  # the objective is contrastive
            return z.image, z.text

        key = jax.random.fold_in(key, _SELECTION)
        params = joined(state.params, state.frozen)
        return select_batch(e, self.mesh, self.teacher, embed, params, batch, key)

    def tokens_per_step(self, image_size: int, batch: dict[str, Any] | None = None) -> int:
        """Return the number of tokens that the towers process in a step, without dropped ones.

        `batch` has arrays or their shapes; None: a batch of the config's sizes.
        """
        e = self.experiment
        count, vision = e.batch_size, e.model.vision
        if batch is not None:
            count, images = _rows(batch["images"]), batch["images"]
            if e.sequence_lengths:
                assert isinstance(images, Patches)
                vision = dataclasses.replace(vision, max_patches=images.mask.shape[1])
        full_size = image_size == vision.image_size  # NaFlex: its maximum
        patches = vision.tokens(None if full_size else image_size, training=True)
        if batch is not None and isinstance(batch["tokens"], tuple):
            return count * patches + sum(math.prod(part.shape) for part in batch["tokens"])
        text_tokens = e.model.text.tokens(masking=e.text_masking)
        return count * (patches + (0 if e.objective == "classification" else text_tokens))

    def _average(self, ema: Params | None, params: Params, step: Array) -> Params | None:
        """Update the EMA; its decay ramps up so that the initial weights fade quickly."""
        if ema is None:
            return None
        max_decay = self.experiment.optimizer.ema
        assert max_decay is not None  # EMA is on
        decay = jnp.minimum(max_decay, (1 + step) / (10 + step))
        return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), ema, params)

    # ------------------------------------------------------------- the state and its model

    def _build(self) -> DualEncoder:
        e = self.experiment
        execution = Execution(dtype=compute_dtype(e.dtype), remat=e.remat, scan=self.scan)
        model = DualEncoder(e.model, execution=execution, rngs=nnx.Rngs(e.seed))
        return model if e.adapter is None else adapters.prepared(model, e.adapter, e.seed)

    def _model(self, params: Params, graph: nnx.GraphDef) -> DualEncoder:
        return nnx.merge(graph, {k: v for k, v in params.items() if k not in HEADS})

    def _init(self, total_steps: Int[Array, ""]) -> TrainState:
        params = nnx.to_pure_dict(nnx.state(self._build()))
        if self.experiment.objective == "classification":
            shape = (self.classes, self.experiment.model.embed_dim)
            params["head"] = {"kernel": jnp.zeros(shape, jnp.float32)}
        if self.experiment.distill is not None and self.experiment.distill.projection:
            params["distill"] = self._projections()
        params, frozen = self.partition(params)
        return TrainState(
            step=jnp.int32(0),
            total_steps=total_steps,
            params=params,
            frozen=frozen,
            opt_state=self.optimizer.init(params),
            ema=params if self.experiment.optimizer.ema is not None else None,
            skipped=jnp.int32(0),
        )

    def _projections(self) -> Params:
        """Initialise projections from the student's space to the teacher's, by modality."""
        assert self.teacher is not None
        e, start = self.experiment, nnx.initializers.lecun_normal()
        keys = jax.random.split(jax.random.fold_in(jax.random.key(e.seed), _PROJECTIONS))
        shape = (e.model.embed_dim, self.teacher.width)
        sides = zip(("image", "text"), keys, strict=True)
        return {side: {"kernel": start(key, shape, jnp.float32)} for side, key in sides}

    def partition(self, params: Params) -> tuple[Params, Params]:
        """Split the parameters of a whole model and its heads into (trained, frozen)."""
        e = self.experiment
        unused = UNTRAINED.get(e.objective, set())

        def trained(path):
            if path[0] in HEADS:
                return not is_frozen(e, path)
            return path[0] not in unused and is_trained(e, path, self.constants)

        return partition(params, trained)

    def _check_patterns(self) -> None:
        """Check the regular expressions of parameter names, and that something is trained."""
        e, state = self.experiment, self.abstract_state
        patterns = {f"optimizer.{f}": dict(getattr(e.optimizer, f)) for f in ("rates", "decays")}
        check_patterns({"freeze": e.freeze}, joined(state.params, state.frozen))
        if not jax.tree.leaves(state.params):
            raise ConfigError(
                f"nothing is trained: freeze {e.freeze} and lock {e.lock!r} leave no parameter"
            )
        check_patterns(patterns, state.params)

    def checkpoint_state(self, state: TrainState) -> TrainState:
        """Return the part of a state that a checkpoint stores.

        It has no base model of an adapter, and of the optimizer's chain only the links with arrays,
        so that clipping, decay and rates can change at a resume.
        """
        links = {"links": [link for link in state.opt_state if jax.tree.leaves(link)]}
        frozen = state.frozen if self.experiment.adapter is None else {}
        return dataclasses.replace(state, frozen=frozen, opt_state=links)

    def from_checkpoint(self, restored: TrainState) -> TrainState:
        """Return the state of a `checkpoint_state`, whose `frozen` it keeps."""
        links = iter(restored.opt_state["links"])
        chain = self.abstract_state.opt_state
        opt_state = tuple(next(links) if jax.tree.leaves(link) else link for link in chain)
        return dataclasses.replace(restored, opt_state=opt_state)

    def check_losses(self, state: TrainState, image_size: int) -> None:
        """Trace a step with losses of the user, so that a wrong one is refused before the first.

        Raises:
            ConfigError: a loss is wrong: see `vlm.training.custom_losses.check_losses`.
        """
        if any(isinstance(loss, Code) for loss, _ in self.experiment.losses):
            width = None if self.teacher is None else self.teacher.width
            rows = batch_sharding(self.mesh)
            batch = jax.tree.map(lambda x: placed(x, rows), batch_shapes(self.experiment, width))
            self.step_at(image_size).eval_shape(state, batch)

    kept = renamed_method("Trainer.kept", "checkpoint_state")
    divide = renamed_method("Trainer.divide", "partition")

    def model(self, state: TrainState) -> DualEncoder:
        """Return the model with EMA parameters if EMA is on, else with the raw parameters."""
        return self._model(joined(_eval_params(state), state.frozen), self.graph)

    def _head(self, state: TrainState) -> Float[Array, "m d"]:
        return _eval_params(state)["head"]["kernel"]

    def _embed_images(self, state: TrainState, images: UInt8[Array, "b h w 3"] | Patches):
        return self.model(state).encode_image(self.preprocess.normalize(images))

    def _embed_texts(self, state: TrainState, tokens: Int[Array, "b l"]):
        return self.model(state).encode_text(tokens)


def batch_shapes(e: Experiment, teacher_width: int | None) -> dict[str, Any]:
    """Return shapes and dtypes of a step's input; `teacher_width` is that of its embeddings."""

    def rows(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((e.super_batch_size, *shape), dtype)

    image = Preprocess(e.preprocess).blank(1)
    batch: dict[str, Any] = {
        "images": jax.tree.map(lambda x: rows(*x.shape[1:], dtype=x.dtype), image),
        "tokens": rows(e.model.text.context_length),
    }
    if e.objective != "contrastive":
        batch["classes"] = rows()
    if teacher_width is not None:
        z = rows(teacher_width, dtype=jnp.float32)
        batch |= {"teacher_image": z, "teacher_text": z}
    return batch


def _rows(images: Any) -> int:
    """Number of images in a batch of pixels or patches."""
    return jax.tree.leaves(images)[0].shape[0]


def _eval_params(state: TrainState) -> Params:
    """Return EMA parameters if EMA is on, else the raw parameters."""
    return state.params if state.ema is None else state.ema


def compute_dtype(name: str) -> np.dtype:
    """Return the dtype of products and activations: "auto" is bfloat16, on a CPU float32."""
    check_choice("dtype", name, ("auto", "float32", "bfloat16"))
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _where(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
