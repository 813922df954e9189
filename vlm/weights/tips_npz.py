"""Google's own files of TIPS and TIPSv2 for JAX: `NAME_vision.npz`, `NAME_text.npz`.

They are those of https://github.com/google-deepmind/tips (scenic/): a file for each tower, and the
vocabulary apart as `tokenizer.model`. The shapes say every size. Beside transformers' form of the
same weights the factors of layer scale are folded in, class tokens have no position, the GELU is
tanh's and every norm has an epsilon of 1e-6. The second and later class tokens are our registers.

The authors' JAX example resizes floating-point images, their PyTorch example resizes with Pillow;
we do the latter, which differs by the rounding to whole numbers.
"""

import math
import os
import string
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Shaped
from tokenizers import normalizers

from vlm.config import ModelConfig, PreprocessConfig, TextConfig, TokenizerConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights import sentencepiece
from vlm.weights.big_vision import NpzFile
from vlm.weights.checkpoint import Checkpoint
from vlm.weights.flax_layers import attention, dense, mlp, norm
from vlm.weights.rules import Rule, Transform, leading
from vlm.weights.tipsv2 import TEMPERATURE, WithTemperature
from vlm.weights.vocabularies import check_vocabulary

_IMAGE, _TEXT = "_vision.npz", "_text.npz"
_TOKENS = "vision/encoder/ToTokenSequence_0"
_POSITION = f"{_TOKENS}/posembed_input"
_CLASSES = f"{_TOKENS}/cls"
_CLASS, _REGISTERS = f"{_CLASSES}[:1]", f"{_CLASSES}[1:]"  # two parts of one tensor
_TEMPERATURE = "text/temperature_contrastive"
_LENGTH = 64  # tokens of a text; the positions are computed, so that no shape says it
_VOCABULARY = "https://storage.googleapis.com/tips_data/v1_0/checkpoints/tokenizer.model"


def recognises(path: epath.Path) -> bool:
    """Whether `path` is a file of one of these models, or a folder that holds some."""
    if path.is_dir():
        return any(file.name.endswith((_IMAGE, _TEXT)) for file in path.iterdir())
    return path.name.endswith((_IMAGE, _TEXT)) and path.is_file()


def open_checkpoint(path: epath.Path) -> Checkpoint:
    """The checkpoint in a folder, or of which `path` is one tower.

    Raises:
        CheckpointError: it is torn, of another form, or lacks a tower or its vocabulary.
    """
    stem = _stem(path)
    tensors = Towers(stem)
    config = model_config(tensors.shapes, tensors.where)
    tokenizer = _tokenizer(stem.parent / "tokenizer.model", config)
    check_vocabulary(tokenizer, config, stem.parent)
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
        WithTemperature(tensors, _TEMPERATURE, 1 / config.init_scale),
        rules(config),
        lambda name: False,
        "bilinear_antialias",
    )


def _stem(path: epath.Path) -> epath.Path:
    """The path of a model without the ends of its two files.

    Raises:
        CheckpointError: a folder has several models.
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


class Towers:
    """The tensors of both files, their names behind "vision/" and "text/".

    Raises:
        CheckpointError: one of the files is missing or torn.
    """

    def __init__(self, stem: epath.Path):
        self.where = os.fspath(stem)
        for end in (_IMAGE, _TEXT):
            if not (file := stem.parent / f"{stem.name}{end}").exists():
                raise CheckpointError(
                    f"there is no {file}: a model of TIPS has two files, so put the other tower "
                    "beside the one that is there"
                )
        self._files = {
            "vision": NpzFile(stem.parent / f"{stem.name}{_IMAGE}"),
            "text": NpzFile(stem.parent / f"{stem.name}{_TEXT}"),
        }
        self.shapes: dict[str, tuple[int, ...]] = {
            f"{tower}/{name}": shape
            for tower, file in self._files.items()
            for name, shape in file.shapes.items()
        }
        classes = self.shapes.pop(_CLASSES, ())
        if len(classes) == 3 and classes[1]:
            self.shapes[_CLASS] = (classes[0], 1, classes[2])
            if classes[1] > 1:
                self.shapes[_REGISTERS] = (classes[0], classes[1] - 1, classes[2])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        if name in (_CLASS, _REGISTERS):
            tokens = self.read(_CLASSES, start, stop)
            return tokens[:, :1] if name == _CLASS else tokens[:, 1:]
        tower, _, own = name.partition("/")
        return self._files[tower].read(own, start, stop)


def model_config(shapes: Mapping[str, tuple[int, ...]], where: str) -> ModelConfig:
    """The configuration of a model, from the shapes of its parameters.

    Raises:
        CheckpointError: the files are of another form.
    """
    if any(".attn." in name for name in shapes):
        raise CheckpointError(
            f"{where} is in TIPS's PyTorch form: get the files of its scenic form, or the folder "
            "of the same model from the Hugging Face Hub"
        )
    try:
        patch_size, _, _, width = shapes[f"{_TOKENS}/embedding/kernel"]
        _, rows, columns, _ = shapes[_POSITION]
        vocab_size, text_width = shapes["text/token_emb/emb_var"]
        gated = _first("vision/encoder/transformer", "FFNSwiGluFused_0/Dense_0") in shapes
        mlp = "FFNSwiGluFused_0" if gated else "MlpBlock_0"
        image = _tower(shapes, "vision/encoder/transformer", mlp)
        text = _tower(shapes, "text/transformer", "MlpBlock_0")
        registers = shapes.get(_REGISTERS, (1, 0))[1]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where} is no model of TIPS ({error}): get it again") from None
    if rows != columns:
        raise CheckpointError(
            f"{where} has positions for {rows} x {columns} patches: vlm reads square grids"
        )
    if width != text_width:
        raise CheckpointError(
            f"{where} has a vision tower of width {width} and a text tower of {text_width}: they "
            "are not of one model"
        )
    return ModelConfig(
        ViTConfig(
            image_size=rows * patch_size,
            patch_size=patch_size,
            width=width,
            **image,
            pool="class",
            registers=registers,
            mlp="swiglu_plain" if gated else "plain",
        ),
        TextConfig(
            vocab_size=vocab_size,
            context_length=_LENGTH,
            width=width,
            **text,
            pool="mean",
            positions="sinusoidal",
            scale_embedding=True,
            pad_id=0,
            activation="relu",
            projection="none",
        ),
        embed_dim=width,
    )


def _first(encoder: str, name: str) -> str:
    return f"{encoder}/encoderblock_0/{name}/kernel"


def _tower(shapes: Mapping[str, tuple[int, ...]], encoder: str, mlp: str) -> dict[str, Any]:
    query = shapes[_first(encoder, "MultiHeadDotProductAttention_0/query")]
    blocks = (name for name in shapes if name.startswith(f"{encoder}/encoderblock_"))
    return {
        "depth": len({name.removeprefix(encoder).split("/")[1] for name in blocks}),
        "heads": query[1],
        "mlp_dim": shapes[_first(encoder, f"{mlp}/Dense_0")][1],
    }


def _tokenizer(path: epath.Path, config: ModelConfig) -> Tokenizer:
    """Pieces of lower-case text without an end token, padded with zeros.

    Raises:
        CheckpointError: there is no vocabulary, which the message says where to get.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path.parent} has no {path.name}, which TIPS keeps apart: put {_VOCABULARY} there"
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


# --------------------------------------------------------------------- their names and ours

# Their grid is an image, and class tokens have no position: the first row of ours is then zero.
_GRID = Transform(
    lambda s: (1, *[math.isqrt(s[0] - 1)] * 2, s[1]),
    lambda x, s: np.concatenate([np.zeros_like(x[0, 0, :1]), x.reshape(-1, s[1])]),
    lambda x: x[1:].reshape(1, *[math.isqrt(len(x) - 1)] * 2, x.shape[1]),
)


def rules(config: ModelConfig) -> list[Rule]:
    """The table of a model, for the tensors of both `Towers`."""
    vision = config.vision
    assert isinstance(vision, ViTConfig)
    registers = [Rule(_REGISTERS, "vision.registers", leading(1))] if vision.registers else []
    layer, block = "vision/encoder/transformer/encoderblock_{}", "vision.transformer.blocks"
    text, words = "text/transformer/encoderblock_{}", "text.transformer.blocks"
    if vision.mlp == "plain":
        gated = mlp(f"{layer}/MlpBlock_0", f"{block}.mlp")
    else:
        parts = ("gate", "up", "down")
        gated = [
            rule
            for number, part in enumerate(parts)
            for rule in dense(f"{layer}/FFNSwiGluFused_0/Dense_{number}", f"{block}.mlp.{part}")
        ]
    return [
        Rule(_TEMPERATURE, "logit_scale", TEMPERATURE),
        *dense(f"{_TOKENS}/embedding", "vision.stem"),
        Rule(_CLASS, "vision.class_token", leading(2)),
        *registers,
        Rule(_POSITION, "vision.position", _GRID),
        *_layer(layer, block),
        *gated,
        *norm("vision/encoder/encoder_norm", "vision.norm"),
        Rule("text/token_emb/emb_var", "text.embedding"),
        *_layer(text, words),
        *mlp(f"{text}/MlpBlock_0", f"{words}.mlp"),
        *norm("text/text_encoder_norm", "text.norm"),
    ]


def _layer(theirs: str, ours: str) -> list[Rule]:
    """A block but for its MLP."""
    return [
        *norm(f"{theirs}/LayerNorm_0", f"{ours}.attention_norm"),
        *attention(f"{theirs}/MultiHeadDotProductAttention_0", f"{ours}.attention"),
        *norm(f"{theirs}/LayerNorm_1", f"{ours}.mlp_norm"),
    ]
