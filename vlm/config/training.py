"""Configs of a training run: the mesh, and the whole experiment."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from vlm.config.base import Config
from vlm.config.batch_sizes import check_sequence_lengths, check_text_lengths
from vlm.config.code import Code, ImportPath
from vlm.config.data import DataConfig
from vlm.config.divergence import DivergenceConfig
from vlm.config.evaluation import EvalConfig
from vlm.config.fine_tuning import AdapterConfig, DistillConfig
from vlm.config.inputs import PreprocessConfig, TokenizerConfig
from vlm.config.local_checkpoints import LocalCheckpointConfig
from vlm.config.model import Loss, ModelConfig
from vlm.config.optimizer import UNSET, Converted, OptimizerConfig, Resolved, check_pattern
from vlm.config.phases import Phase, check_phases
from vlm.config.selection import SelectionConfig
from vlm.config.towers import VisionTowerConfig
from vlm.errors import ConfigError

# Rematerialisation policies, from the most memory to the least: see `Experiment.remat`.
RematPolicy = Literal["none", "dots", "dots_no_batch", "full"]


@dataclass(frozen=True)
class MeshConfig(Config):
    """Sizes of the mesh axes; one of them may be -1, for all remaining devices.

    Args:
        data: Size of the axis that shards the batch alone. -1: all remaining devices.
        fsdp: Size of the axis that shards the batch and the parameters with their optimizer state.
            None: up to 16 on TPUs, if data is -1; else 1.
        tensor: Size of the axis that shards attention heads and the hidden layers of MLPs.
        gather: How many of the parameters that fsdp shards are whole on a device at a time. layer:
            those of one layer, which needs least memory, for blocks of `vlm.nn.Transformer`;
            others are whole. step: all during a step, so that micro-batches communicate once.
            None: step with micro-batches, else layer.

    Example:
        >>> vlm.MeshConfig(data=-1, fsdp=8)  # data: all remaining devices
        MeshConfig(data=-1, fsdp=8, tensor=1, gather=None)
    """

    data: int = -1
    fsdp: int | None = None
    tensor: int = 1
    gather: Literal["layer", "step"] | None = None

    def check(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if 0 in sizes or sizes.count(-1) > 1:
            raise ConfigError(
                f"{self}: sizes are positive, and at most one is -1, for all remaining devices"
            )
        if self.gather == "step" and self.tensor != 1:
            raise ConfigError(
                f"{self}: gather step needs tensor 1: XLA's partitioner gathers each layer"
            )


@dataclass(frozen=True)
class Experiment(Config):
    """Config of a run of `vlm train`.

    Args:
        name: Name of the run and of its model.
        model: The two towers and their shared space. None: those of init_from; without
            init_from, a ViT-B/16 with a text tower.
        preprocess: Image preprocessing. None: that of init_from.
        tokenizer: Tokenization of texts. None: that of init_from.
        tokenizer_file: The vocabulary: a tokenizer.json, or "clip" for OpenAI's, which is part of
            vlm. None: it is learned from the data.
        data: Source of the training pairs.
        evals: Data sets to evaluate on, besides the eval split of `data`, and functions of your own
            of a bundle and the step that return metrics. All captions of that
            split are embedded each time: for large data, set eval_split to None and evals to
            smaller data. With neither, the run is not evaluated.
        optimizer: The optimizer, its schedule and its safeguards.
        mesh: Mesh of the devices.
        batch_size: Global batch size in pairs. It counts all devices and hosts.
        micro_batch_size: Pairs that the towers process at a time. It counts all devices. The loss
            is still exact for the global batch. None: the global batch at once.
        steps: Length of the run in steps. Give one of steps, epochs, examples and seconds.
        epochs: Length of the run in epochs. One epoch is a pass over the data. Give one of steps,
            epochs, examples and seconds.
        examples: Length of the run in pairs seen. Give one of steps, epochs, examples and
            seconds.
        seconds: Length of the run in seconds of training. They are converted to steps at the
            start. Give one of steps, epochs, examples and seconds.
        dtype: Computation type of the towers. Parameters are float32. auto: bfloat16, but float32
            on a CPU.
        matmul_dtype: Type that the linear layers of the towers' blocks round their inputs to, in
            training. float8: e4m3, and e5m2 for gradients, with a scale for each tensor; for NVIDIA
            GPUs from Ada and Hopper on. None: dtype.
        remat: Activations that a block saves for the backward pass. none: all; dots: inputs and
            outputs of attention, and the MLP's hidden layer; dots_no_batch: the same without the
            output of attention; full: only the block's input. One of your own is a policy of
            `jax.checkpoint`.
        scan: Compile the blocks as a loop over one of them. Otherwise each block is compiled, which
            takes longer, but saves the loop's copies of activations: a tenth of a step on TPUs.
            None: false on TPUs for towers of at most 32 blocks, else true.
        lock: Tower to freeze (LiT).
        objective: Training objective. contrastive: image-text pairs with the model's loss; flyp:
            the same with the classes of data.label in templates (arXiv:2212.00638), where images of
            one class are not negatives of each other; classification: the vision tower and a linear
            head, initialised from the zero-shot text embeddings of the classes.
        distill: Distillation from a teacher. None: no teacher.
        init_from: Model to start from, as in `vlm.load`. Its input is square or NaFlex, as in
            preprocess. None: random initialisation.
        init_towers: Towers to take from the model of init_from.
        init_image_size: Image size in pixels, in place of that of init_from; position embeddings
            are resized. For NaFlex: the number of patches of such a square. None: that of
            init_from.
        init_context_length: Number of tokens of a text. None: that of init_from.
        adapter: Train low-rank adapters alone; the run exports them as a small bundle. None: train
            the model.
        resolution_schedule: Smaller images at the start, as pairs of a fraction of the run and a
            size in pixels; the rest of the run uses the full size. Square images only.
        text_masking: Fraction of a text's tokens that training drops, padding first.
        seed: Random seed. It determines parameters, data order, augmentation and dropout.
        log_every: Number of steps between two rows of the log.
        eval_every: Fraction of the run between two evaluations. None: only at the end. 0: never.
        checkpoint_every: Fraction of the run between two checkpoints.
        checkpoint_minutes: Maximum minutes between two checkpoints. None: checkpoint_every alone.
        keep_checkpoints: Number of newest checkpoints to keep.
        keep_hours: Also keep one checkpoint every so many hours. None: only the newest.
        profile: First and last step of a trace by jax.profiler. None: no trace.
        run_dir: Folder of the run. It may be remote. None: runs/NAME-DATE.
        losses: Losses of your own and their weights, in place of the model's loss: functions of
            `vlm.losses.LossInputs`, and "softmax" or "sigmoid". Empty: the model's loss.
        loss_intermediates: Names of activations of the towers that losses read, such as
            "vision/embedding".
        freeze: Regular expressions of parameter names: a parameter whose whole name matches is not
            trained.
        callbacks: Callbacks of the run, such as `vlm.callbacks.WandB()`.
        code: Import paths of your own code in this config, each with a hash of its source. The run
            fills them in.
        selection: Online data selection: train on a part of each super-batch, chosen by learner and
            reference (JEST, ACID). examples and epochs then count the pairs of super-batches. With
            distill, its teacher is the reference. None: train on all pairs.
        phases: Changes of fields on the way, each from a point of the run on. On the command line
            they are one JSON list: `--phases`.
        sequence_lengths: Image sequence lengths of a NaFlex model, in patches: each step has one of
            them for all of its images, in random order. A batch is batch_size x max_patches
            patches, so shorter images come in more pairs. A length that is listed twice is used
            twice as often. Empty: max_patches alone.
        text_lengths: Lengths in tokens that short texts of a batch are padded to, in place of the
            whole context. The text tower must ignore padding. Embeddings are the same. Empty: all
            texts have the whole context.
        divergence: Detection of a diverging run, and rollbacks to the last good checkpoint.
        local_checkpoints: Frequent checkpoints on the local disks of the hosts.

    Example:
        >>> import dataclasses
        >>> longer = dataclasses.replace(experiment, steps=100)
        >>> longer.steps, longer.model == experiment.model
        (100, True)
    """

    name: str = "experiment"
    if TYPE_CHECKING:
        model: Resolved[ModelConfig] = UNSET
        preprocess: Resolved[PreprocessConfig] = UNSET
        tokenizer: Resolved[TokenizerConfig] = UNSET
    else:
        model: ModelConfig | None = None
        preprocess: PreprocessConfig | None = None
        tokenizer: TokenizerConfig | None = None
    tokenizer_file: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    evals: tuple[EvalConfig | ImportPath, ...] = ()
    if TYPE_CHECKING:
        optimizer: Converted[OptimizerConfig] = UNSET
    else:
        optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    batch_size: int = 1024
    micro_batch_size: int | None = None
    steps: int | None = None
    epochs: float | None = None
    examples: int | None = None
    seconds: float | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    matmul_dtype: Literal["float8"] | None = None
    remat: RematPolicy | ImportPath = "dots_no_batch"
    scan: bool | None = None
    lock: Literal["none", "vision", "text"] = "none"
    objective: Literal["contrastive", "flyp", "classification"] = "contrastive"
    distill: DistillConfig | None = None
    init_from: str | None = None
    init_towers: Literal["both", "vision", "text"] = "both"
    init_image_size: int | None = None
    init_context_length: int | None = None
    adapter: AdapterConfig | None = None
    resolution_schedule: tuple[tuple[float, int], ...] = ()
    text_masking: float = 0.0
    seed: int = 0
    log_every: int = 10
    eval_every: float | None = None
    checkpoint_every: float = 0.25
    checkpoint_minutes: float | None = 15.0
    keep_checkpoints: int = 2
    keep_hours: float | None = None
    profile: tuple[int, int] | None = None
    run_dir: str | None = None
    if TYPE_CHECKING:
        losses: Converted[tuple[tuple[str, float], ...]] = UNSET
    else:
        losses: tuple[tuple[Loss | ImportPath, float], ...] = ()
    loss_intermediates: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    callbacks: tuple[ImportPath, ...] = ()
    code: tuple[tuple[str, str], ...] = ()
    selection: SelectionConfig | None = None
    phases: tuple[Phase, ...] = ()
    sequence_lengths: tuple[int, ...] = ()
    text_lengths: tuple[int, ...] = ()
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    local_checkpoints: LocalCheckpointConfig = field(default_factory=LocalCheckpointConfig)

    @property
    def in_parts(self) -> bool:
        """Whether a step processes its batch in micro-batches."""
        return self.micro_batch_size not in (None, self.batch_size)

    @property
    def gathers_once(self) -> bool:
        """Whether parameters that are sharded over fsdp are gathered once a step: `mesh.gather`."""
        return (self.mesh.gather or ("step" if self.in_parts else "layer")) == "step"

    @property
    def super_batch_size(self) -> int:
        """Pairs that a step reads: `batch_size`, or more with a selection."""
        return self.batch_size * (1 if self.selection is None else self.selection.super_batch)

    def check(self):
        lengths = ("steps", "epochs", "examples", "seconds")
        given = [name for name in lengths if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"a run has one length, but {' and '.join(given)} are all set: keep one"
            )
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}: choose one that divides it"
            )
        if sum(share for share, _ in self.resolution_schedule) > 1:
            raise ConfigError(
                f"resolution_schedule {self.resolution_schedule} must have fractions of the run "
                "that add up to at most 1: the rest trains at the full size"
            )
        self._check_start()
        self._check_objective()
        self._check_selection()
        self._check_own_parts()
        if self.divergence.action == "roll_back" and self.keep_checkpoints < 2:
            raise ConfigError(
                'divergence.action "roll_back" needs a checkpoint from before a spike, and '
                f"keep_checkpoints {self.keep_checkpoints} may leave only one from inside it: keep "
                "2 or more"
            )
        if self.model is not None or self.init_from is None:
            self._check_model(self.model or ModelConfig())
        if self.phases:
            object.__setattr__(self, "phases", check_phases(self))

    def _check_start(self) -> None:
        if self.init_from is None:
            self.refuse_unused("name a model with init_from", "init_towers")
        if self.lock != "none":
            rate = f"{self.lock}_rate"
            self.optimizer.refuse_unused(
                f"the tower is not trained: leave lock {self.lock!r} out", rate
            )
        if self.adapter is not None and (self.lock != "none" or self.init_towers != "both"):
            field = "lock" if self.lock != "none" else "init_towers"
            raise ConfigError(
                f"adapter freezes both towers of one model, and {field} is "
                f"{getattr(self, field)!r}: leave it out, and choose a tower with adapter.targets, "
                'such as "text.*"'
            )
        if self.lock != "none" and self.init_from is None:
            raise ConfigError(
                f"lock {self.lock!r} keeps a tower as it starts, and without init_from that is at "
                "random: name the model that it comes from"
            )
        if self.lock != "none" and self.init_towers not in ("both", self.lock):
            raise ConfigError(
                f"lock {self.lock!r} keeps a tower as it starts, and init_towers "
                f'{self.init_towers!r} leaves it at random: set init_towers to "both" or '
                f"{self.lock!r}"
            )
        sizes = (self.init_image_size, self.init_context_length)
        if sizes != (None, None) and (self.init_from is None or self.model is not None):
            raise ConfigError(
                "init_image_size and init_context_length are sizes of the model that init_from "
                "gives: name one, and leave model out"
            )

    def _check_own_parts(self) -> None:
        losses = [loss_name(loss) for loss, _ in self.losses]
        for part, names in (("losses", losses), ("evals", [item.name for item in self.evals])):
            for name in names:
                if names.count(name) > 1:
                    raise ConfigError(f"two of {part} are called {name!r}: give each its own name")
        for pattern in self.freeze:
            check_pattern(pattern, "freeze")
        if self.losses and self.objective == "classification":
            self.refuse_unused(
                'objective "classification" has a loss of its own: leave objective out', "losses"
            )
        if self.losses and not any(weight for _, weight in self.losses):
            raise ConfigError(f"all weights of losses {dict(self.losses)} are 0: give one above")
        if not any(isinstance(loss, Code) for loss, _ in self.losses):
            self.refuse_unused("only losses of your own read it: add one", "loss_intermediates")

    def _check_selection(self) -> None:
        selection = self.selection
        if selection is None:
            return
        if self.objective != "contrastive":
            raise ConfigError(
                f"selection scores pairs by the contrastive loss, and objective is "
                f'{self.objective!r}: set it to "contrastive", or leave selection out'
            )
        if self.batch_size % selection.chunks:
            raise ConfigError(
                f"batch_size {self.batch_size} is not a multiple of selection.chunks "
                f"{selection.chunks}: choose a number of chunks that divides it"
            )
        own = selection.reference or selection.stored
        if self.distill is not None and own:
            raise ConfigError(
                f"the reference of a selection is the teacher of distill, and selection names "
                f"{own!r}: leave selection.reference and selection.stored out"
            )
        if self.distill is None and not own and selection.score != "hard_learner":
            raise ConfigError(
                f"selection.score {selection.score!r} needs a reference: give selection.reference, "
                "a model for vlm.load, or selection.stored, a folder of its embeddings"
            )

    def _check_objective(self) -> None:
        if self.distill is not None and bool(self.distill.teacher) == bool(self.distill.stored):
            raise ConfigError(
                "distill needs exactly one teacher: give distill.teacher, a model for vlm.load, "
                "or distill.stored, a folder of its embeddings"
            )
        if self.distill is not None and self.objective == "classification":
            raise ConfigError(
                'distill compares images and texts, and objective "classification" has no texts: '
                'choose "flyp"'
            )
        if self.objective == "contrastive":
            return
        if self.data.label is None:
            raise ConfigError(
                f"objective {self.objective!r} learns classes: set data.label to the feature that "
                "holds them"
            )
        if self.objective == "flyp":
            return
        if self.init_from is None or self.init_towers != "both":
            raise ConfigError(
                'objective "classification" starts from the text embeddings of a model: set '
                'init_from, and init_towers to "both"'
            )
        if self.text_masking:
            raise ConfigError('objective "classification" reads no text: leave text_masking at 0')

    def _check_model(self, model: ModelConfig) -> None:
        vision = model.vision
        for tower in ("vision", "text"):
            if getattr(model, tower).kind == "none":
                raise ConfigError(
                    f"the model has no {tower} tower, and contrastive training needs both: start "
                    "from a model with both, or give the config of a new one"
                )
        if vision.video_frames is not None:
            raise ConfigError(
                f"the vision tower of kind {vision.kind!r} takes videos, and vlm trains on images: "
                "start from an image model, such as ViT-B-32"
            )
        if vision.vectors > 1:
            raise ConfigError(
                f"the vision tower makes {vision.vectors} vectors of an image, and the losses take "
                "one: start from another model, such as ViT-B-32"
            )
        if self.preprocess is not None and self.preprocess.image_size != vision.image_size:
            raise ConfigError(
                f"preprocess.image_size {self.preprocess.image_size} is not the model's "
                f"{vision.image_size}: set both to the same number"
            )
        length = model.text.context_length
        if self.tokenizer is not None and self.tokenizer.context_length != length:
            raise ConfigError(
                f"tokenizer.context_length {self.tokenizer.context_length} is not the model's "
                f"{length}: set both to the same number"
            )
        check_text_lengths(self, model.text)
        for name, tower in (("vision", vision), ("text", model.text)):
            if tower.kind == "module" and name != self.lock and self.optimizer.layer_decay != 1.0:
                raise ConfigError(
                    f"optimizer.layer_decay {self.optimizer.layer_decay:g} needs the order of the "
                    f"blocks, and the {name} tower is a module of your own: leave it at 1.0, and "
                    "set rates by parameter names with optimizer.rates"
                )
        if self.resolution_schedule and vision.kind != "vit":
            raise ConfigError(
                "resolution_schedule needs a Vision Transformer, and the vision tower is a "
                f"{type(vision).__name__}: leave it empty"
            )
        patch = vision.patch_size
        if any(size % patch or size < patch for _, size in self.resolution_schedule):
            raise ConfigError(
                f"resolution_schedule {self.resolution_schedule} has sizes that are not "
                f"multiples of patch_size {patch}: choose multiples"
            )
        if self.preprocess is not None:
            self._check_budget(self.preprocess, vision)
        if getattr(vision, "rotary", None) is not None and (
            getattr(vision, "patch_dropout", 0.0) or self.resolution_schedule
        ):
            what = "resolution_schedule" if self.resolution_schedule else "patch_dropout"
            raise ConfigError(
                f"{what} needs a tower without rotary positions, which are those of the whole "
                f"grid: leave it {'empty' if self.resolution_schedule else 'at 0'}"
            )

    def _check_budget(self, preprocess: PreprocessConfig, vision: VisionTowerConfig) -> None:
        """Check that model, preprocessing and training all are NaFlex or none is."""
        budget = getattr(vision, "max_patches", None)
        if preprocess.resize != "naflex":
            self.refuse_unused(
                f"it needs a NaFlex model, and preprocess.resize is {preprocess.resize!r}: leave "
                "it empty",
                "sequence_lengths",
            )
            if budget is not None:
                raise ConfigError(
                    f"model.vision.max_patches {budget} is only valid with NaFlex, and "
                    f"preprocess.resize is {preprocess.resize!r}: set max_patches to None, or "
                    'resize to "naflex"'
                )
            return
        for name, ours in (("max_patches", budget), ("patch_size", vision.patch_size)):
            if getattr(preprocess, name) != ours or ours is None:
                raise ConfigError(
                    f'preprocess.{name} {getattr(preprocess, name)} of resize "naflex" is not '
                    f"model.vision.{name} {ours}: set both to the same number"
                )
        for name in ("resolution_schedule", "distill", "selection"):
            if getattr(self, name):
                raise ConfigError(
                    f'{name} is of square images, and preprocess.resize "naflex" makes images of '
                    'any aspect: leave it out, or set resize="squash" and '
                    "model.vision.max_patches=None"
                )
        assert budget is not None
        check_sequence_lengths(self, budget)


def loss_name(loss: str) -> str:
    """Return the name of a loss in logs: softmax, sigmoid, or that of a function."""
    return loss.name if isinstance(loss, Code) else loss
