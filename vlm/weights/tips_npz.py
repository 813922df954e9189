"""Google's own files of TIPS and TIPSv2 for JAX: `NAME_vision.npz`, `NAME_text.npz`.

They are published at https://github.com/google-deepmind/tips (scenic/): one file per tower, and the
vocabulary separately as `tokenizer.model`. The shapes give all sizes. Unlike in transformers'
format of the same weights, layer scales are folded in, class tokens have no position, GELU is the
tanh approximation, and every norm has an epsilon of 1e-6. Class tokens after the first are our
registers.

The authors' JAX example resizes floating-point images, their PyTorch example resizes with Pillow.
We do the latter, which differs by the rounding to integers.
"""

import functools
import math
import os
import string

import numpy as np
from etils import epath
from tokenizers import normalizers

from vlm.config import ModelConfig, PreprocessConfig, TextConfig, TokenizerConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights import sentencepiece
from vlm.weights.big_vision import NpzFile
from vlm.weights.checkpoint import Checkpoint, Computed, ComputedTensors
from vlm.weights.files import Arrays
from vlm.weights.flax_layers import attention_half, block, dense, encoder_sizes, norm
from vlm.weights.rules import Rule, Shapes, Transform, leading
from vlm.weights.tipsv2 import TEMPERATURE, with_temperature

_IMAGE, _TEXT = "_vision.npz", "_text.npz"
_TOKENS = "vision/encoder/ToTokenSequence_0"
_POSITION = f"{_TOKENS}/posembed_input"
_CLASSES = f"{_TOKENS}/cls"
_CLASS, _REGISTERS = f"{_CLASSES}[:1]", f"{_CLASSES}[1:]"  # two parts of one tensor
_TEMPERATURE = "text/temperature_contrastive"
_LENGTH = 64  # tokens of a text; positions are computed, so no shape gives it
_VOCABULARY = "https://storage.googleapis.com/tips_data/v1_0/checkpoints/tokenizer.model"


def recognises(path: epath.Path) -> bool:
    """Whether `path` is a file of such a model, or a folder that has some."""
    if path.is_dir():
        return any(file.name.endswith((_IMAGE, _TEXT)) for file in path.iterdir())
    return path.name.endswith((_IMAGE, _TEXT)) and path.is_file()


def open_checkpoint(path: epath.Path) -> Checkpoint:
    """Open the checkpoint in a folder, or the one to which the file of one tower belongs."""
    stem = _stem(path)
    tensors = _open_towers(stem)
    config = model_config(tensors.shapes, tensors.where)
    tokenizer = _tokenizer(stem.parent / "tokenizer.model", config)
    return Checkpoint(
        stem.name,
        config,
        PreprocessConfig(
            image_size=config.vision.image_size,
            kernel="bilinear",
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        ),
        tokenizer,
        with_temperature(tensors, _TEMPERATURE, 1 / config.init_scale),
        rules(config),
        lambda name: False,
        "bilinear_antialias",
    )


def _stem(path: epath.Path) -> epath.Path:
    """Path of a model without the endings of its two files.

    Raises:
        CheckpointError: the folder has several models.
    """
    files = list(path.iterdir()) if path.is_dir() else [path]
    stems = {
        file.name.removesuffix(end)
        for file in files
        for end in (_IMAGE, _TEXT)
        if file.name.endswith(end)
    }
    if len(stems) > 1:
        raise CheckpointError(
            f"{path} has the files of several models, {', '.join(sorted(stems))}: give the path of "
            f"one, such as {path / (min(stems) + _IMAGE)}"
        )
    return (path if path.is_dir() else path.parent) / stems.pop()


def _open_towers(stem: epath.Path) -> ComputedTensors:
    """Join the tensors of both files, with the prefixes "vision/" and "text/".

    Raises:
        CheckpointError: one of the files is missing or corrupt.
    """
    computed: dict[str, Computed] = {}
    for tower, end in (("vision", _IMAGE), ("text", _TEXT)):
        if not (path := stem.parent / f"{stem.name}{end}").exists():
            raise CheckpointError(
                f"there is no {path}: a model of TIPS has two files, so put the other tower beside "
                "the one that is there"
            )
        file = NpzFile(path)
        for name, shape in file.shapes.items():
            computed[f"{tower}/{name}"] = shape, functools.partial(file.read, name)
    shape, read = computed.pop(_CLASSES, ((), None))
    if read is not None and len(shape) == 3 and shape[1]:
        count, width = shape[1:]
        computed[_CLASS] = (shape[0], 1, width), lambda start, stop: read(start, stop)[:, :1]
        if count > 1:
            registers = (shape[0], count - 1, width)
            computed[_REGISTERS] = registers, lambda start, stop: read(start, stop)[:, 1:]
    return ComputedTensors(Arrays({}, os.fspath(stem)), computed)


def model_config(shapes: Shapes, where: str) -> ModelConfig:
    """Configuration of a model, from the shapes of its parameters.

    Raises:
        CheckpointError: the files are of another form.
    """
    if any(".attn." in name for name in shapes):
        raise CheckpointError(
            f"{where} is in TIPS's PyTorch form: get the files of its scenic form, or the folder "
            "of the same model from the Hugging Face Hub"
        )
    try:
        patch_size, _, _, _ = shapes[f"{_TOKENS}/embedding/kernel"]
        _, rows, columns, _ = shapes[_POSITION]
        vocab_size, _ = shapes["text/token_emb/emb_var"]
        encoder = "vision/encoder/transformer"
        gated = f"{encoder}/encoderblock_0/FFNSwiGluFused_0/Dense_0/kernel" in shapes
        image = encoder_sizes(shapes, encoder, "FFNSwiGluFused_0" if gated else "MlpBlock_0")
        text = encoder_sizes(shapes, "text/transformer")
        registers = shapes.get(_REGISTERS, (1, 0))[1]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where} is no model of TIPS ({error}): get it again") from None
    if rows != columns:
        raise CheckpointError(
            f"{where} has positions for {rows} x {columns} patches: vlm reads square grids"
        )
    if image["width"] != text["width"]:
        raise CheckpointError(
            f"{where} has a vision tower of width {image['width']} and a text tower of "
            f"{text['width']}: they belong to different models"
        )
    return ModelConfig(
        ViTConfig(
            image_size=rows * patch_size,
            patch_size=patch_size,
            **image,
            pool="class",
            registers=registers,
            mlp="swiglu_plain" if gated else "plain",
        ),
        TextConfig(
            vocab_size=vocab_size,
            context_length=_LENGTH,
            **text,
            pool="mean",
            positions="sinusoidal",
            scale_embedding=True,
            pad_id=0,
            activation="relu",
            projection="none",
        ),
        embed_dim=image["width"],
    )


def _tokenizer(path: epath.Path, config: ModelConfig) -> Tokenizer:
    """Read the vocabulary: lower-case text without an end token, padded with zeros.

    Raises:
        CheckpointError: there is none; the message has its address.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path.parent} has no {path.name}, which TIPS publishes separately: put "
            f"{_VOCABULARY} there"
        )
    vocabulary = sentencepiece.read(path)
    # tf.strings.lower, which the authors use, changes the letters of ASCII alone.
    steps: list[normalizers.Normalizer] = [
        normalizers.Replace(upper, upper.lower()) for upper in string.ascii_uppercase
    ]
    if vocabulary.normalizer is not None:
        steps.append(vocabulary.normalizer)
    vocabulary.normalizer = normalizers.Sequence(steps)
    rules = TokenizerConfig(context_length=config.text.context_length, pad_id=0, eos_id=None)
    return Tokenizer(vocabulary, rules)


# Their grid is an image, and class tokens have no position: our first row becomes zero.
_GRID = Transform(
    lambda s: (1, *[math.isqrt(s[0] - 1)] * 2, s[1]),
    lambda x, s: np.concatenate([np.zeros_like(x[0, 0, :1]), x.reshape(-1, s[1])]),
    lambda x: x[1:].reshape(1, *[math.isqrt(len(x) - 1)] * 2, x.shape[1]),
)


def rules(config: ModelConfig) -> list[Rule]:
    """Rules of a model."""
    vision = config.vision
    assert isinstance(vision, ViTConfig)
    registers = [Rule(_REGISTERS, "vision.registers", leading(1))] if vision.registers else []
    layer, ours = "vision/encoder/transformer/encoderblock_{}", "vision.transformer.blocks"
    if vision.mlp == "plain":
        layers = block(layer, ours)
    else:
        layers = attention_half(layer, ours)
        for number, part in enumerate(("gate", "up", "down")):
            layers += dense(f"{layer}/FFNSwiGluFused_0/Dense_{number}", f"{ours}.mlp.{part}")
    return [
        Rule(_TEMPERATURE, "logit_scale", TEMPERATURE),
        *dense(f"{_TOKENS}/embedding", "vision.stem"),
        Rule(_CLASS, "vision.class_token", leading(2)),
        *registers,
        Rule(_POSITION, "vision.position", _GRID),
        *layers,
        *norm("vision/encoder/encoder_norm", "vision.norm"),
        Rule("text/token_emb/emb_var", "text.embedding"),
        *block("text/transformer/encoderblock_{}", "text.transformer.blocks"),
        *norm("text/text_encoder_norm", "text.norm"),
    ]
