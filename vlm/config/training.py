"""One run of training: the update rule, the mesh, and the experiment that holds everything."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from vlm.config.adapters import AdapterConfig
from vlm.config.base import Config
from vlm.config.data import DataConfig
from vlm.config.distillation import DistillConfig
from vlm.config.evaluation import EvalConfig
from vlm.config.inputs import PreprocessConfig, TokenizerConfig
from vlm.config.model import ModelConfig
from vlm.config.towers import VisionTowerConfig
from vlm.errors import ConfigError

# What a block keeps for its backward pass, the most memory first: see `Experiment.remat`.
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
        learning_rate: Learning rate at its peak. None: 1e-3; of a run that starts from a model,
            one that fine-tuning survives, by width and batch (see vlm/config/defaults.py).
        end_learning_rate: Learning rate at the end of the schedules cosine, rsqrt and wsd.
        schedule: How the learning rate goes on after the warm-up. rsqrt: inverse square root of
            the step; wsd: constant, then decay.
        warmup: Share of the run's steps in which the learning rate rises from 0. None: 0.05, and
            0.1 where the run starts from a model.
        cooldown: Share of the run's steps in which rsqrt and wsd decay to the end.
        weight_decay: Strength of weight decay; norms, biases and the logits' scale and bias
            have none, and the factors of low-rank adapters have it.
        weight_decay_rule: What weight_decay is multiplied by. open_clip: a step takes
            learning_rate * weight_decay of every matrix, as in PyTorch and optax; big_vision:
            it takes weight_decay, times the schedule relative to its peak, of every kernel.
        l2_sp: Strength of a pull of all weights towards those that the run starts from
            (L2-SP, arXiv:1802.01483), in the units of weight_decay, which is then not used. 0:
            none.
        b1: Decay of the average of gradients.
        b2: Decay of the average of squared gradients; of Adafactor, the most that it grows to.
        eps: Number that keeps divisions by small averages finite.
        clip_norm: Largest norm of the whole gradient; a longer one is scaled down. None: no
            limit.
        layer_decay: Learning rate of a block relative to that of the block above it.
        vision_rate: Learning rate of the vision tower relative to learning_rate.
        text_rate: Learning rate of the text tower relative to learning_rate.
        ema: Decay of the moving average of the parameters, which is what the run leaves. None:
            no average.
        max_scale: Factor of the cosines in the logits above which no step raises it; CLIP's is
            100. One that starts above it, as SigLIP's does, may fall. None: no limit.
        on_nonfinite: What happens at a loss or gradient that is not finite. stop: the run ends;
            skip: the step changes nothing.
        max_skipped_in_a_row: Of on_nonfinite skip: the run stops when this many steps in a row are
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
                'optimizer.schedule "constant" never comes to end_learning_rate '
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
                f"optimizer.weight_decay {self.weight_decay} by big_vision's rule takes that share "
                "of every kernel at every step: give a share such as 1e-4, or choose "
                'weight_decay_rule "open_clip"'
            )


@dataclass(frozen=True)
class MeshConfig(Config):
    """Sizes of the mesh axes; one of them may be -1 and takes what is left of the devices.

    Args:
        data: Size of the axis that only the batch is cut over. -1: what the other axes leave of
            the devices.
        fsdp: Size of the axis that the batch and the parameters are cut over.
        tensor: Size of the axis that attention heads and the hidden layers of MLPs are cut
            over.

    Example:
        >>> vlm.MeshConfig(data=-1, fsdp=8)  # data takes what is left
        MeshConfig(data=-1, fsdp=8, tensor=1)
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def check(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if 0 in sizes or sizes.count(-1) > 1:
            raise ConfigError(
                f"{self}: sizes are positive, and at most one is -1 and takes what is left"
            )


@dataclass(frozen=True)
class Experiment(Config):
    """One run of `vlm train`, whole.

    Args:
        name: Name of the run and of its model.
        model: The towers, and the space that they share. None: those of init_from; without
            one, a ViT-B/16 and a text tower beside it.
        preprocess: How an image becomes pixels. None: as init_from has it.
        tokenizer: How a text becomes tokens. None: as init_from has it.
        tokenizer_file: The vocabulary: a tokenizer.json, or "clip" for OpenAI's, which comes
            with vlm. None: one is learned from the data.
        data: Where pairs come from.
        evals: Data sets to measure on, beside the held-out split of `data`. All captions of
            that split are embedded each time, so large data has eval_split None and something
            here. With neither the run is not evaluated.
        optimizer: The update rule, its schedule and its safeguards.
        mesh: How the devices are laid out.
        batch_size: Number of pairs in a step, over all devices and hosts.
        micro_batch_size: Number of pairs that the towers take at a time, over all devices; the
            loss is still that of the whole batch. None: the whole batch at once.
        steps: Length of the run in steps. Give one of steps, epochs, examples and seconds.
        epochs: Length of the run in passes over the data. Give one of steps, epochs, examples
            and seconds.
        examples: Length of the run in pairs seen. Give one of steps, epochs, examples and
            seconds.
        seconds: Length of the run in seconds of training, which become a number of steps at the
            start. Give one of steps, epochs, examples and seconds.
        dtype: Type that the towers compute in; parameters stay float32. auto: bfloat16, but
            float32 on a CPU.
        remat: What a block keeps for its backward pass, the most memory first. none:
            everything; dots: what goes into and comes out of attention, and the MLP's hidden
            layer; dots_no_batch: that without attention's result; full: its input alone.
        scan: Compile the blocks as a loop over one of them. False: each for itself, which takes
            longer to compile.
        lock: A tower that is not trained (LiT).
        objective: What is learned. contrastive: pairs of images and texts, by the model's loss;
            flyp: the same with the classes of data.label in sentences (arXiv:2212.00638), where
            images of one class are no negatives of each other; classification: the vision tower and
            a head over these classes, which starts from their zero-shot text embeddings.
        distill: A larger model to learn from, beside the pairs. None: the pairs alone.
        init_from: A model to start from: whatever `vlm.load` takes. It takes square images, or
            is NaFlex, as preprocess says. None: start at random.
        init_towers: Which towers are taken from that model.
        init_image_size: Side of the images in place of that model's, in pixels; its position
            embeddings are resized. Of NaFlex: as many patches as such a square has.
        init_context_length: Number of tokens of a text in place of that model's.
        adapter: Low-rank adapters, which alone are trained; the run leaves them as a small bundle.
            None: the model itself is trained.
        resolution_schedule: Smaller images at the start, as pairs of a fraction of the run and a
            size in pixels; the rest of the run uses the full size. Square images only.
        text_masking: Share of a text's places that are left out while training, padding first.
        seed: Seed of everything that is random: parameters, order of the data, augmentation,
            dropout.
        log_every: Number of steps between two rows of the log.
        eval_every: Share of the run between two evaluations. None: at the end alone. 0: never.
        checkpoint_every: Share of the run between two checkpoints.
        checkpoint_minutes: Most minutes between two checkpoints. None: by checkpoint_every
            alone.
        keep_checkpoints: Number of checkpoints to keep, the newest ones.
        keep_hours: Keep one checkpoint of every so many hours for good. None: the newest alone.
        profile: First and last step of a trace by jax.profiler. None: no trace.
        run_dir: Folder of the run, local or remote. None: runs/NAME-DATE.

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
                "distill learns from one teacher: give distill.teacher, whatever vlm.load takes, "
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
        """Refuse a NaFlex model whose images are none, or that is trained as it cannot be."""
        budget = getattr(vision, "max_patches", None)
        if preprocess.resize != "naflex":
            if budget is not None:
                raise ConfigError(
                    f"model.vision.max_patches {budget} is of NaFlex, and preprocess.resize "
                    f'{preprocess.resize!r} makes squares: set it to None, or resize to "naflex"'
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
                raise ConfigError(f"two of evals are called {name!r}: give each a name of its own")
