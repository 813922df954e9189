"""Models from checkpoints: abstract first, then filled with the parameters of their towers."""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from vlm._deprecation import warn
from vlm.config import ModelConfig, PreprocessConfig, absence
from vlm.errors import ConfigError, ShardingError
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.nn.transformer import Execution
from vlm.sharding import AXES, Rules, parameter_spec
from vlm.weights.files import Tensors
from vlm.weights.rules import Rule, expand, fill, flat_shapes

Tower = Literal["both", "vision", "text"]


DTYPES: dict[str, Any] = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
}
_LARGEST = 8  # tensors that tell a checkpoint's type


def check_dtype(name: str) -> None:
    """Check the name of a parameter type.

    Raises:
        ConfigError: it is unknown.
    """
    if name != "stored" and name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported: choose {', '.join(DTYPES)} or stored")


def parameter_dtype(name: str, tensors: Tensors) -> Any:
    """Convert the name of a parameter type; "stored" is that of most large tensors in the file.

    Quantized weights and float64 become float32.
    """
    if name != "stored":
        return DTYPES[name]
    sizes = {tensor: math.prod(shape) for tensor, shape in tensors.shapes.items() if shape}
    largest = sorted(sizes, key=lambda tensor: -sizes[tensor])[:_LARGEST]
    found = collections.Counter(str(tensors.read(tensor, 0, 1).dtype) for tensor in largest)
    return DTYPES.get(found.most_common(1)[0][0] if found else "float32", jnp.float32)


def checked_tower(tower: str) -> Tower:
    """Return `tower`; "image" is the deprecated name of the vision tower.

    Raises:
        ConfigError: `tower` is something else.
    """
    if tower == "image":
        warn('tower="image"', 'tower="vision"')
        return "vision"
    if tower not in ("both", "vision", "text"):
        raise ConfigError(f"tower {tower!r} is unknown: choose both, vision or text")
    return tower


def check_tower(model: DualEncoder, tower: Literal["vision", "text"], name: str) -> None:
    """Raise a ConfigError if the model called `name` is without this tower."""
    if getattr(model, tower) is None:
        raise ConfigError(absence(tower, getattr(model.config, tower), name))


def check_images(model: DualEncoder, name: str, *, multi_vector: bool = False) -> None:
    """Raise a ConfigError if the model called `name` does not embed images.

    It has no vision tower, one of videos, or, without `multi_vector`, one of several vectors an
    image.
    """
    check_tower(model, "vision", name)
    if (frames := model.config.vision.video_frames) is not None:
        raise ConfigError(
            f"{name} embeds videos of {frames} frames, not images: use encode_video, or an image "
            "model such as ViT-B-32"
        )
    if (count := model.config.vision.vectors) > 1 and not multi_vector:
        raise ConfigError(
            f"{name} makes {count} vectors of an image, and this takes one: use "
            "vlm.heads.image_tokens, vlm.heads.MultiVectorIndex or vlm.ZeroShotClassifier"
        )


def check_inputs(
    config: ModelConfig, preprocess: PreprocessConfig, tokenizer: Tokenizer, name: str
) -> None:
    """Raise a ConfigError if the inputs do not match the model called `name`."""
    text, vision = config.text, config.vision
    if tokenizer.vocab_size > text.vocab_size:
        raise ConfigError(
            f"{name}: the tokenizer has {tokenizer.vocab_size:,} tokens and the model's embedding "
            f"table has {text.vocab_size:,}: use the tokenizer that the model was trained with"
        )
    if tokenizer.config.context_length > text.context_length:
        raise ConfigError(
            f"{name}: context_length is {tokenizer.config.context_length} in the tokenizer and "
            f"{text.context_length} in the model: set both to the same value"
        )
    if preprocess.image_size != vision.image_size:
        raise ConfigError(
            f"{name}: image_size is {preprocess.image_size} in the preprocessing and "
            f"{vision.image_size} in the model: set both to the same value"
        )


def abstract_model(config: ModelConfig, dtype: DTypeLike) -> DualEncoder:
    """Model of shapes without data, to be filled."""
    execution = Execution(dtype=dtype)
    return nnx.eval_shape(lambda: DualEncoder(config, execution=execution, rngs=nnx.Rngs(0)))


def parameter_shardings(
    mesh: Mesh, rules: Rules = ()
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Sharding of each parameter on a mesh, by its dotted name and its shape.

    Raises:
        ShardingError: the mesh has an axis that is in no rule.
    """
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise ShardingError(
            f"the mesh has an axis {unknown[0]!r}, and parameters lie over {', '.join(AXES)}: make "
            "it with vlm.sharding.make_mesh"
        )
    # All axes, in their order and as Auto: the compiler decides how the towers are sharded.
    order = [mesh.axis_names.index(name) for name in AXES if name in mesh.axis_names]
    devices = mesh.devices.transpose(order)
    full = Mesh(devices.reshape([mesh.shape.get(name, 1) for name in AXES]), AXES)
    return lambda name, shape: NamedSharding(
        full, parameter_spec(tuple(name.split(".")), shape, full, rules)
    )


def fill_towers(
    skeleton: DualEncoder,
    rules: Sequence[Rule],
    tensors: Tensors,
    tower: Tower,
    *,
    ignored: Callable[[str], bool] = lambda name: False,
    **options: Any,
) -> DualEncoder:
    """Fill both towers with `rules.fill`, or one; the other is then removed from the model.

    Raises:
        CheckpointError: the file does not fit the model.
        ConfigError: an unknown `tower`.
    """
    tower = checked_tower(tower)
    present = [name for name in ("vision", "text") if getattr(skeleton, name) is not None]
    if tower != "both" and tower not in present:
        raise ConfigError(f"the model has no {tower} tower: load it with tower='both'")
    if tower == "both" or present == [tower]:
        return fill(skeleton, rules, tensors, ignored=ignored, **options)
    other = "text" if tower == "vision" else "vision"
    prefix = f"{other}."
    kept: list[Rule] = []
    dropped: list[Rule] = []
    for rule in rules:
        name = rule.ours if isinstance(rule.ours, str) else rule.ours[0]
        (dropped if name.startswith(prefix) else kept).append(rule)
    left_out = {layer.theirs for layer in expand(dropped, flat_shapes(skeleton))}
    setattr(skeleton, other, None)
    return fill(
        skeleton, kept, tensors, ignored=lambda name: name in left_out or ignored(name), **options
    )
