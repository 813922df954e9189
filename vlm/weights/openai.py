"""OpenAI's own files, `ViT-B-32.pt` and the like: TorchScript archives whose shapes say it all."""

import math
import os
import re
from collections.abc import Mapping

from etils import epath

from vlm.config import (
    CLIP_MEAN,
    CLIP_STD,
    ModelConfig,
    PreprocessConfig,
    ResNetConfig,
    TextConfig,
    ViTConfig,
)
from vlm.errors import CheckpointError
from vlm.weights import open_clip
from vlm.weights.checkpoint import Checkpoint
from vlm.weights.torch_pickle import TorchFile
from vlm.weights.vocabularies import check_vocabulary, clip_tokenizer

_HEAD_DIM = 64  # of all of OpenAI's models

Shapes = Mapping[str, tuple[int, ...]]


def recognises(path: epath.Path) -> bool:
    """Whether `path` may be one of OpenAI's files."""
    return path.suffix in (".pt", ".pth") and path.is_file()


def open_checkpoint(path: epath.Path) -> Checkpoint:
    """The checkpoint in a file.

    Raises:
        CheckpointError: it is torn, or does not say what model it is of.
    """
    where = os.fspath(path)
    tensors = TorchFile(path)
    if not tensors.is_script and "input_resolution" not in tensors.shapes:
        # open_clip's training files have the same names and another activation: never guess.
        raise CheckpointError(
            f"{where} does not say what model it is of: put it as open_clip_pytorch_model.bin into "
            "a folder with its open_clip_config.json, and load the folder"
        )
    config = model_config(tensors.shapes, where)
    tokenizer = clip_tokenizer(config.text.context_length)
    check_vocabulary(tokenizer, config, where)
    return Checkpoint(
        path.stem,
        config,
        preprocess_config(config.vision.image_size),
        tokenizer,
        tensors,
        open_clip.rules(config, tensors.shapes),
        ignored,
        "bicubic_antialias",
        "linear",
    )


def model_config(shapes: Shapes, where: str) -> ModelConfig:
    """The configuration of an OpenAI checkpoint, from the shapes of its tensors.

    Raises:
        CheckpointError: the tensors are not those of an OpenAI model.
    """
    try:
        vision = _vit(shapes) if "visual.proj" in shapes else _resnet(shapes)
        context_length, width = shapes["positional_embedding"]
        vocab_size, _ = shapes["token_embedding.weight"]
        mlp_dim = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]
        _, embed_dim = shapes["text_projection"]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where} is not one of OpenAI's CLIP models ({error})") from None
    text = TextConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        width=width,
        depth=_count(shapes, r"transformer\.resblocks\.\d+\.ln_1\.weight"),
        heads=width // _HEAD_DIM,
        mlp_dim=mlp_dim,
        causal=True,
        pool="argmax",
        projection="linear",
        activation="quick_gelu",
        norm_eps=1e-5,
    )
    return ModelConfig(vision, text, embed_dim=embed_dim, loss="softmax")


def preprocess_config(image_size: int) -> PreprocessConfig:
    """The pixels that all of OpenAI's models take."""
    return PreprocessConfig(image_size=image_size, resize="crop", mean=CLIP_MEAN, std=CLIP_STD)


def ignored(name: str) -> bool:
    """Numbers beside the parameters, and counters of batch norm."""
    return name in ("input_resolution", "context_length", "vocab_size") or name.endswith(
        ("attn_mask", "num_batches_tracked")
    )


def _vit(shapes: Shapes) -> ViTConfig:
    width, _, patch_size, _ = shapes["visual.conv1.weight"]
    grid = math.isqrt(shapes["visual.positional_embedding"][0] - 1)
    return ViTConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        width=width,
        depth=_count(shapes, r"visual\.transformer\.resblocks\.\d+\.ln_1\.weight"),
        heads=width // _HEAD_DIM,
        mlp_dim=shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        pool="class",
        class_token=True,
        pre_norm=True,
        patch_bias=False,
        projection="linear",
        activation="quick_gelu",
        norm_eps=1e-5,
    )


def _resnet(shapes: Shapes) -> ResNetConfig:
    grid = math.isqrt(shapes["visual.attnpool.positional_embedding"][0] - 1)
    width = shapes["visual.conv3.weight"][0]
    return ResNetConfig(
        image_size=grid * 32,
        depths=tuple(
            _count(shapes, rf"visual\.layer{stage}\.\d+\.conv1\.weight") for stage in (1, 2, 3, 4)
        ),
        width=width,
        heads=width * 32 // _HEAD_DIM,
    )


def _count(shapes: Shapes, pattern: str) -> int:
    return sum(bool(re.fullmatch(pattern, name)) for name in shapes)
