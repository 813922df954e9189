"""Rules of what a resumed run may change: one decision for each field of each config."""

import dataclasses
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, NamedTuple

from vlm.config.base import Config, json_value
from vlm.config.data import DataConfig
from vlm.config.optimizer import OptimizerConfig


class Effect(Enum):
    """Effect of a changed field on a resumed run; for a refused change, the reason."""

    FREE = "the saved state stays valid"
    DATA = "the saved state stays valid; if the position in the data does not, a new pass begins"
    NEW_PASS = "the saved state stays valid; a new pass over the data begins"
    STATE = "which the saved parameters or optimizer state depend on"
    TRAINED = "which the saved optimizer state depends on (a phase of the run may change it)"
    START = "which only acts at the start of a run"
    RESOLUTION = (
        "which the saved position embeddings depend on (use a phase of the run, "
        "--resolution-schedule, or a new run with --init-image-size)"
    )
    TOKENIZER = "which is saved with the tokenizer in the run folder"
    HELD_OUT = "since the run would be evaluated on examples that it was trained on"
    FOLDER = "which is the folder of --resume"

    @property
    def refused(self) -> bool:
        """Whether a resumed run cannot make the change."""
        return self not in (Effect.FREE, Effect.DATA, Effect.NEW_PASS)


FREE, DATA, NEW_PASS = Effect.FREE, Effect.DATA, Effect.NEW_PASS
STATE, START = Effect.STATE, Effect.START

# A decision, or a function of the configs before and after that have the field.
Decision = Effect | Callable[[Any, Any], Effect]


def _ema(before: OptimizerConfig, after: OptimizerConfig) -> Effect:
    """The decay may change; a run without EMA has no averages."""
    return FREE if (before.ema is None) == (after.ema is None) else STATE


def _l2_sp(before: OptimizerConfig, after: OptimizerConfig) -> Effect:
    """The strength may change; a run without L2-SP has not stored its initial parameters."""
    return FREE if bool(before.l2_sp) == bool(after.l2_sp) else STATE


def _objective(before: Any, after: Any) -> Effect:
    """The classification has a head, and does not train the text tower."""
    return STATE if "classification" in (before.objective, after.objective) else FREE


def _distill(before: Any, after: Any) -> Effect:
    configs = (before.distill, after.distill)
    return STATE if any(c is not None and c.projection for c in configs) else FREE


def _init_from(before: Any, after: Any) -> Effect:
    """The base model of an adapter may move: its weights are compared at the start."""
    both = after.adapter is not None and None not in (before.init_from, after.init_from)
    return FREE if both else START


def _tokenizer_file(before: Any, after: Any) -> Effect:
    """The vocabulary may move: it is compared with that of the run folder at the start."""
    return FREE if None not in (before.tokenizer_file, after.tokenizer_file) else START


def _image_size(before: Any, after: Any) -> Effect:
    """A tower without position embeddings has the same parameters at every size."""
    any_size = not before.attends and before.one_size is None
    return FREE if any_size else Effect.RESOLUTION


def _all(effect: Effect, names: str) -> dict[str, Decision]:
    return dict.fromkeys(names.split(), effect)


# By class and field. Classes that are not listed are parts of the towers: see `decision`.
_DECISIONS: dict[str, dict[str, Decision]] = {
    "Experiment": _all(
        FREE,
        "name preprocess data optimizer mesh evals micro_batch_size steps epochs "
        "examples seconds dtype matmul_dtype remat scan resolution_schedule text_masking log_every "
        "eval_every checkpoint_every checkpoint_minutes keep_checkpoints keep_hours profile losses "
        "loss_intermediates callbacks code selection phases text_lengths divergence "
        "local_checkpoints",
    )
    | _all(START, "init_towers init_image_size init_context_length")
    | _all(STATE, "model adapter")
    | _all(Effect.TRAINED, "lock freeze")
    | {
        "batch_size": DATA,
        "sequence_lengths": DATA,
        "seed": NEW_PASS,
        "run_dir": Effect.FOLDER,
        "tokenizer": Effect.TOKENIZER,
        "objective": _objective,
        "distill": _distill,
        "init_from": _init_from,
        "tokenizer_file": _tokenizer_file,
    },
    "ModelConfig": _all(STATE, "vision text embed_dim loss full_dim")
    | _all(START, "init_scale init_bias")
    | _all(FREE, "matryoshka"),
    "PreprocessConfig": _all(
        FREE,
        "image_size resize pad_value patch_size max_patches kernel backend antialias mean std "
        "short_side crop_rounding background decode",
    ),
    "TokenizerConfig": _all(
        Effect.TOKENIZER,
        "context_length pad_id bos_id eos_id lowercase clean keep_eos pad_side parse_special "
        "zeroed_id truncation_side prompts default_prompt prompt_required",
    ),
    "DataConfig": _all(
        FREE,
        "eval_split caption_weights class_names templates augment cache workers prefetch "
        "max_bad_share max_bad_in_a_row mixture_temperature",
    )
    | _all(
        DATA,
        "source train_split image captions label filters data_dir access interleave mixture "
        "scores",
    )
    | {"shuffle": NEW_PASS, "weight_column": NEW_PASS, "hold_out": Effect.HELD_OUT},
    "MixturePart": _all(
        FREE, "weight epochs examples caption_weights class_names templates"
    )
    | _all(DATA, "source train_split image captions label filters access data_dir weight_column "
           "scores"),
    "FieldFilter": _all(DATA, "feature at_least at_most one_of"),
    "AugmentConfig": _all(
        FREE, "crop aspect jitter hue flip randaugment grey blur solarise morphology draft"
    ),
    "EvalConfig": _all(
        FREE,
        "name task source split image captions label class_names templates data_dir examples",
    ),
    "OptimizerConfig": _all(
        FREE,
        "learning_rate warmup end_learning_rate schedule timescale cooldown weight_decay "
        "weight_decay_rule b1 b2 eps clip_norm layer_decay vision_rate text_rate max_scale "
        "on_nonfinite max_skipped_in_a_row rates decays",
    )
    | _all(STATE, "name transformation")
    | {"ema": _ema, "l2_sp": _l2_sp},
    "MeshConfig": _all(FREE, "data fsdp tensor gather"),
    "AdapterConfig": _all(STATE, "rank alpha targets dora quantize"),
    "DistillConfig": _all(FREE, "teacher stored task relations features distance temperature")
    | {"projection": STATE},
    "SelectionConfig": _all(FREE, "score chunks reference stored") | {"filter_ratio": DATA},
    "DivergenceConfig": _all(
        FREE, "action window threshold in_a_row max_rollbacks max_skipped"
    ),
    "LocalCheckpointConfig": _all(FREE, "folder every"),
    # Phases that have begun are compared at the step of the checkpoint.
    "Phase": _all(FREE, "changes step fraction examples restart_schedule"),
}  # fmt: skip
# Fields of the towers and their stages. A field that is not here is part of the architecture.
_TOWERS: dict[str, Decision] = {
    "dropout": FREE,
    "patch_dropout": FREE,
    "max_patches": FREE,
    "partition": FREE,
    "image_size": _image_size,
}


def decision(cls: type[Config], field: str) -> Decision:
    """Return the decision on a field of a config.

    Raises:
        KeyError: a field of a listed class that is not decided.
    """
    if cls.__name__ in _DECISIONS:
        return _DECISIONS[cls.__name__][field]
    return _TOWERS.get(field, STATE)


def effect_of_change(before: Config, after: Config, field: str) -> Effect:
    """Return the effect of a changed field of two configs of the same class."""
    decided = decision(type(before), field)
    return decided if isinstance(decided, Effect) else decided(before, after)


def position_fields(
    data: DataConfig, seed: int, batch_size: int, sequence_lengths: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Return the fields that the position in the training data depends on, by dotted name."""
    values = json_value(data)
    names = [name for name, of in _DECISIONS["DataConfig"].items() if of in (DATA, NEW_PASS)]
    own = {f"data.{name}": values[name] for name in sorted(names)}
    lengths = list(sequence_lengths)  # as in JSON
    return {"batch_size": batch_size, "sequence_lengths": lengths, "seed": seed, **own}


def begins_new_pass(names: list[str]) -> bool:
    """Whether changes of these fields begin a new pass, even where the old position fits."""
    decided = {
        f"{start}{name}": of
        for cls, start in (("Experiment", ""), ("DataConfig", "data."))
        for name, of in _DECISIONS[cls].items()
    }
    return any(decided[name] is NEW_PASS for name in names)


class Change(NamedTuple):
    """A changed field: its dotted name, its values as JSON, and its effect."""

    name: str
    old: Any
    new: Any
    effect: Effect


def changes_between(before: Config, after: Config) -> list[Change]:
    """Return the fields that differ between two experiments, sorted by name."""
    return sorted(_differences(before, after, ""), key=lambda change: change.name)


def option_of(name: str) -> str:
    """Return the option of a field by its dotted name."""
    return "--" + name.replace("_", "-")


def _differences(before: Any, after: Any, name: str, effect: Effect | None = None) -> Iterator:
    """Yield the changes inside of two values of the field `name`, whose own effect is `effect`."""
    if isinstance(before, Config) and type(before) is type(after):
        for field in dataclasses.fields(before):  # pyright: ignore[reportArgumentType]
            yield from _differences(
                getattr(before, field.name),
                getattr(after, field.name),
                f"{name}.{field.name}" if name else field.name,
                effect_of_change(before, after, field.name),
            )
    elif isinstance(before, tuple) and _same_classes(before, after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from _differences(pair[0], pair[1], f"{name}.{number}")
    elif (old := json_value(before)) != (new := json_value(after)):
        assert effect is not None
        yield Change(name, old, new, effect)


def _same_classes(before: tuple[Any, ...], after: Any) -> bool:
    """Whether two values are tuples of configs of the same classes."""
    return (
        isinstance(after, tuple)
        and list(map(type, before)) == list(map(type, after))
        and all(isinstance(part, Config) for part in before)
    )
