"""OpenAI's own files, such as `ViT-B-32.pt`: TorchScript archives whose shapes give all sizes."""

import math
import os
from typing import Any

from etils import epath

from vlm.config import CLIP_MEAN, CLIP_STD, ModelConfig, PreprocessConfig
from vlm.errors import CheckpointError
from vlm.weights import open_clip
from vlm.weights.checkpoint import Checkpoint
from vlm.weights.rules import Shapes, count_layers
from vlm.weights.torch_pickle import TorchFile
from vlm.weights.vocabularies import clip_tokenizer

_HEAD_DIM = 64  # of all of OpenAI's models


def recognises(path: epath.Path) -> bool:
    """Whether `path` may be one of OpenAI's files."""
    return path.suffix in (".pt", ".pth") and path.is_file()


def open_checkpoint(path: epath.Path) -> Checkpoint:
    """Open the checkpoint in a file."""
    where = os.fspath(path)
    tensors = TorchFile(path)
    if not tensors.is_script and "input_resolution" not in tensors.shapes:
        # open_clip's training files have the same names and another activation: never guess.
        raise CheckpointError(
            f"{where} does not identify its architecture: name it, such as "
            'vlm.load(PATH, architecture="ViT-B-32"), or put the file as '
            "open_clip_pytorch_model.bin beside its open_clip_config.json and load the folder"
        )
    config = model_config(tensors.shapes, where)
    size = config.vision.image_size
    tokenizer = clip_tokenizer(config.text.context_length)
    return Checkpoint(
        path.stem,
        config,
        PreprocessConfig(image_size=size, resize="crop", mean=CLIP_MEAN, std=CLIP_STD),
        tokenizer,
        tensors,
        open_clip.rules(config, tensors.shapes),
        ignored,
        "bicubic_antialias",
        "linear",
    )


def model_config(shapes: Shapes, where: str) -> ModelConfig:
    """Configuration of an OpenAI checkpoint, from the shapes of its tensors.

    Raises:
        CheckpointError: the tensors are not those of an OpenAI model.
    """
    try:
        context_length, width = shapes["positional_embedding"]
        text = {
            "context_length": context_length,
            "vocab_size": shapes["token_embedding.weight"][0],
            "width": width,
            "heads": width // _HEAD_DIM,
            "mlp_ratio": _mlp_ratio(shapes, "transformer", width),
            "layers": count_layers(shapes, "transformer.resblocks.{}.ln_1.weight"),
        }
        vision = _vit(shapes) if "visual.proj" in shapes else _resnet(shapes)
        embed_dim = shapes["text_projection"][1]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where} is not one of OpenAI's CLIP models ({error})") from None
    values = {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    return open_clip.model_config(values, shapes, where)


def _vit(shapes: Shapes) -> dict[str, Any]:
    width, _, patch_size, _ = shapes["visual.conv1.weight"]
    return {
        "image_size": patch_size * math.isqrt(shapes["visual.positional_embedding"][0] - 1),
        "patch_size": patch_size,
        "width": width,
        "head_width": _HEAD_DIM,
        "mlp_ratio": _mlp_ratio(shapes, "visual.transformer", width),
        "layers": count_layers(shapes, "visual.transformer.resblocks.{}.ln_1.weight"),
    }


def _mlp_ratio(shapes: Shapes, transformer: str, width: int) -> float:
    """Ratio whose product with the width, rounded down as in open_clip, is the MLP's width."""
    return (shapes[f"{transformer}.resblocks.0.mlp.c_fc.weight"][0] + 0.5) / width


def _resnet(shapes: Shapes) -> dict[str, Any]:
    stages = [f"visual.layer{stage}.{{}}.conv1.weight" for stage in (1, 2, 3, 4)]
    return {
        "image_size": 32 * math.isqrt(shapes["visual.attnpool.positional_embedding"][0] - 1),
        "layers": [count_layers(shapes, stage) for stage in stages],
        "width": shapes["visual.conv3.weight"][0],
        "head_width": _HEAD_DIM,
    }


def ignored(name: str) -> bool:
    """Whether it is a number beside the parameters, or a counter of batch norm."""
    return name in ("input_resolution", "context_length", "vocab_size") or name.endswith(
        ("attn_mask", "num_batches_tracked")
    )
