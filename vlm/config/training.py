"""Configs of a training run: the optimizer, the mesh, and the whole experiment."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from vlm.config.base import Config
from vlm.config.data import DataConfig
from vlm.config.evaluation import EvalConfig
from vlm.config.fine_tuning import AdapterConfig, DistillConfig
from vlm.config.inputs import PreprocessConfig, TokenizerConfig
from vlm.config.model import ModelConfig
from vlm.config.towers import VisionTowerConfig
from vlm.errors import ConfigError

# Rematerialisation policies, from the most memory to the least: see `Experiment.remat`.
RematPolicy = Literal["none", "dots", "dots_no_batch", "full"]

T = TypeVar("T")
UNSET: Any = None  # default of `Resolved` fields


class Resolved(Generic[T]):
    """For type checkers: a field that accepts None, which `vlm.training.init_from.resolve` fills.

    It reads as non-optional, because all internal readers run after that.
    """

    def __get__(self, instance: object, owner: type) -> T: ...  # pyright: ignore

    def __set__(self, instance: object, value: T | None) -> None: ...


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """The update rule, its schedule and its safeguards.

    Args:
        name: The update rule.
        learning_rate: Peak learning rate. None: 1e-3, or for a run that starts from a model a
            rate by width and batch size.
        end_learning_rate: Learning rate at the end of the schedules cosine, rsqrt and wsd.
        schedule: Learning rate schedule after the warm-up. rsqrt: inverse square root of
            the step; wsd: constant, then decay.
        warmup: Fraction of the run in which the learning rate rises from 0. None: 0.05, or 0.1 for
            a run that starts from a model.
        cooldown: Fraction of the run in which rsqrt and wsd decay at the end.
        weight_decay: Strength of weight decay. It applies to matrices, low-rank adapters included,
            and not to norms, biases, and the scale and bias of the logits.
        weight_decay_rule: Factor of weight_decay. open_clip: learning_rate, for every matrix, as in
            PyTorch and optax; big_vision: the schedule relative to its peak, for every kernel.
        l2_sp: Strength of decay of all weights towards their initial values (L2-SP,
            arXiv:1802.01483), in the units of weight_decay, which it replaces. 0: none.
        b1: Decay of the average of gradients.
        b2: Decay of the average of squared gradients; for Adafactor, its maximum.
        eps: Term that avoids division by zero.
        clip_norm: Maximum global norm of the gradient; a larger one is scaled down. None: no
            limit.
        layer_decay: Learning rate of a block relative to the next one (layer-wise decay).
        vision_rate: Learning rate of the vision tower relative to learning_rate.
        text_rate: Learning rate of the text tower relative to learning_rate.
        ema: Decay of the moving average (EMA) of the parameters, which is exported in place of the
            raw parameters. None: no EMA.
        max_scale: Maximum of the logit scale; CLIP's is 100. A scale that starts above it, as
            SigLIP's, may only decrease. None: no limit.
        on_nonfinite: Action at a loss or gradient that is not finite. stop: end the run; skip: skip
            the update.
        max_skipped_in_a_row: For on_nonfinite skip: stop the run when this many steps in a row are
            skipped.

    Example:
        >>> vlm.OptimizerConfig(name="lion", learning_rate=3e-4).schedule
        'cosine'
    """

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    if TYPE_CHECKING:
        learning_rate: Resolved[float] = UNSET
        warmup: Resolved[float] = UNSET
    else:
        learning_rate: float | None = None
        warmup: float | None = None
    end_learning_rate: float = 0.0
    schedule: Literal["cosine", "rsqrt", "wsd", "constant"] = "cosine"
    cooldown: float = 0.2
    weight_decay: float = 0.1
    weight_decay_rule: Literal["open_clip", "big_vision"] = "open_clip"
    l2_sp: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    clip_norm: float | None = 1.0
    layer_decay: float = 1.0
    vision_rate: float = 1.0
    text_rate: float = 1.0
    ema: float | None = None
    max_scale: float | None = 100.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped_in_a_row: int = 25

    def check(self):
        peak = self.learning_rate
        if peak is not None and self.end_learning_rate > peak:
            raise ConfigError(
                f"optimizer.end_learning_rate {self.end_learning_rate} is above learning_rate "
                f"{peak}, the peak: make it lower"
            )
        if self.end_learning_rate and self.schedule == "constant":
            raise ConfigError(
                'optimizer.schedule "constant" does not decay to end_learning_rate '
                f"{self.end_learning_rate}: choose another schedule or leave it at 0"
            )
        if self.schedule in ("cosine", "constant"):
            self.refuse_unused('set schedule to "rsqrt" or "wsd"', "cooldown")
        if self.name in ("lion", "adafactor"):
            self.refuse_unused('set name to "adamw" or "muon"', "eps")
        if self.on_nonfinite == "stop":
            self.refuse_unused('set on_nonfinite to "skip"', "max_skipped_in_a_row")
        if self.l2_sp and self.weight_decay:
            self.refuse_unused("leave l2_sp out, which replaces it", "weight_decay")
        if self.weight_decay_rule == "big_vision" and peak == 0:
            raise ConfigError(
                'optimizer.weight_decay_rule "big_vision" measures the schedule by its peak, so '
                "learning_rate must be positive"
            )
        by_share = self.weight_decay_rule == "big_vision" and not self.l2_sp
        if by_share and self.weight_decay > 0.05:
            raise ConfigError(
                f"optimizer.weight_decay {self.weight_decay} by big_vision's rule is the fraction "
                "that each step removes from every kernel: set a fraction such as 1e-4, or choose "
                'weight_decay_rule "open_clip"'
            )


@dataclass(frozen=True)
class MeshConfig(Config):
    """Sizes of the mesh axes; one of them may be -1, for all remaining devices.

    Args:
        data: Size of the axis that shards the batch alone. -1: all remaining devices.
        fsdp: Size of the axis that shards the batch and the parameters.
        tensor: Size of the axis that shards attention heads and the hidden layers of MLPs.

    Example:
        >>> vlm.MeshConfig(data=-1, fsdp=8)  # data: all remaining devices
        MeshConfig(data=-1, fsdp=8, tensor=1)
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def check(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if 0 in sizes or sizes.count(-1) > 1:
            raise ConfigError(
                f"{self}: sizes are positive, and at most one is -1, for all remaining devices"
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
        evals: Data sets to evaluate on, besides the eval split of `data`. All captions of that
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
        remat: Activations that a block saves for the backward pass. none: all; dots: inputs and
            outputs of attention, and the MLP's hidden layer; dots_no_batch: the same without the
            output of attention; full: only the block's input.
        scan: Compile the blocks as a loop over one of them. Otherwise each block is compiled, which
            takes longer.
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
    evals: tuple[EvalConfig, ...] = ()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    batch_size: int = 1024
    micro_batch_size: int | None = None
    steps: int | None = None
    epochs: float | None = None
    examples: int | None = None
    seconds: float | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: RematPolicy = "dots_no_batch"
    scan: bool = True
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
        if self.model is not None or self.init_from is None:
            self._check_model(self.model or ModelConfig())
        self._check_evaluation()

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
        patch = vision.patch_size
        if any(size % patch or size < patch for _, size in self.resolution_schedule):
            raise ConfigError(
                f"resolution_schedule {self.resolution_schedule} has sizes that are not "
                f"multiples of patch_size {patch}: choose multiples"
            )
        if self.resolution_schedule and vision.kind != "vit":
            raise ConfigError(
                "resolution_schedule needs a Vision Transformer, and the vision tower is a "
                f"{type(vision).__name__}: leave it empty"
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
        for name in ("resolution_schedule", "distill"):
            if getattr(self, name):
                raise ConfigError(
                    f'{name} is of square images, and preprocess.resize "naflex" makes images of '
                    'any aspect: leave it out, or set resize="squash" and '
                    "model.vision.max_patches=None"
                )

    def _check_evaluation(self) -> None:
        names = [config.name for config in self.evals]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two of evals are called {name!r}: give each its own name")
