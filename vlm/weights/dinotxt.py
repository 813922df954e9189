"""DINOv3's dino.txt (arXiv:2412.16334): a folder with the two files that its authors publish.

One has the backbone, DINOv3's ViT-L/16. The other has the blocks after it and the text encoder. The
embedding of an image is its class token and the mean of its patches, side by side.
"""

import functools
import os

import numpy as np
from etils import epath

from vlm.config import ModelConfig, PreprocessConfig, TextConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.weights.checkpoint import Checkpoint, Computed, ComputedTensors, with_zero_biases
from vlm.weights.files import SafetensorsFile, Shards, Tensors
from vlm.weights.layers import MLP, block, conv, fused, linear, norm, out
from vlm.weights.processors import IMAGENET_MEAN, IMAGENET_STD
from vlm.weights.rules import FLAT, LINEAR, SCALAR_1, Rule, Shapes, count_layers, leading
from vlm.weights.torch_pickle import TorchFile
from vlm.weights.vision_towers import paired
from vlm.weights.vocabularies import clip_tokenizer

ARCHITECTURE = "dinov3_vitl16_dinotxt_tet1280d20h24l"
_ENDINGS = (".pth", ".safetensors")
# A name that only one of the files has.
_FILES = {"the backbone": "cls_token", "the vision head and text encoder": "logit_scale"}
_HEAD_DIM = 64
_HEAD, _TEXT = "visual_model.head", "text_model.backbone"
_SCALED = {
    "attention_norm": "norm1", "attention_scale": "ls1.gamma", "mlp_norm": "norm2",
    "mlp_scale": "ls2.gamma",
}  # fmt: skip
_PROJECTION = "text_model.head.linear_projection"


def open_folder(folder: epath.Path) -> Checkpoint:
    """Open the checkpoint in a folder.

    Raises:
        CheckpointError: no folder, or one without exactly these two files, or other weights.
    """
    tensors = _tensors(folder)
    config = model_config(tensors.shapes, os.fspath(folder))
    vision = config.vision
    assert isinstance(vision, ViTConfig)
    table = rules()
    without = with_zero_biases(tensors, table, lambda name: name.endswith("qkv.bias"))
    return Checkpoint(
        folder.name,
        config,
        PreprocessConfig(
            image_size=vision.image_size,
            resize="crop",
            backend="tensor",
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            short_side=256 * vision.image_size // 224,
        ),
        clip_tokenizer(config.text.context_length),
        _split(without, vision.depth),
        table,
        lambda name: name in ("mask_token", "rope_embed.periods") or name.endswith(".bias_mask"),
        "bicubic",
    )


def _tensors(folder: epath.Path) -> Tensors:
    """Tensors of both files."""
    if not folder.is_dir():
        raise CheckpointError(
            f"architecture {ARCHITECTURE} is for a folder with two files, of the backbone and of "
            f"the vision head and text encoder, which {os.fspath(folder)!r} is not"
        )
    files = [file for file in sorted(folder.iterdir()) if file.suffix in _ENDINGS]
    opened = [SafetensorsFile(f) if f.suffix == ".safetensors" else TorchFile(f) for f in files]
    found = []
    for part, name in _FILES.items():
        having = [tensors for tensors in opened if name in tensors.shapes]
        if len(having) != 1:
            raise CheckpointError(
                f"{folder} has {len(having)} files of {part} ({', '.join(_ENDINGS)}), and dino.txt "
                "has one: put the two files of the model into a folder of their own"
            )
        found += having
    return Shards(found)


def model_config(shapes: Shapes, where: str) -> ModelConfig:
    """Configuration of a model whose tensors have these `shapes`.

    Raises:
        CheckpointError: they are not those of dino.txt.
    """
    try:
        width, text_width = shapes["cls_token"][-1], shapes[f"{_TEXT}.positional_embedding"][1]
        vision = ViTConfig(
            image_size=224,
            patch_size=shapes["patch_embed.proj.weight"][-1],
            width=width,
            depth=count_layers(shapes, "blocks.{}.norm1.weight"),
            heads=width // _HEAD_DIM,
            mlp_dim=shapes["blocks.0.mlp.fc1.weight"][0],
            registers=shapes["storage_tokens"][1],
            activation="gelu",
            norm_eps=1e-5,
            layer_scale=True,
            key_bias=False,
            position=False,
            rotary=0,
            rotary_rows_first=True,
            rotary_base=100.0,
            rotary_centred=True,
            pool="class_mean",
            head_depth=count_layers(shapes, f"{_HEAD}.blocks.{{}}.norm1.weight"),
            head_mlp_dim=shapes[f"{_HEAD}.blocks.0.mlp.w1.weight"][0],
        )
        text = TextConfig(
            vocab_size=shapes[f"{_TEXT}.token_embedding.weight"][0],
            context_length=shapes[f"{_TEXT}.positional_embedding"][0],
            width=text_width,
            depth=count_layers(shapes, f"{_TEXT}.blocks.{{}}.ffn_norm.weight"),
            heads=text_width // _HEAD_DIM,
            mlp_dim=shapes[f"{_TEXT}.blocks.0.feed_forward.fc1.weight"][0],
            causal=True,
            pool="argmax",
            activation="gelu",
            norm_eps=1e-5,
            projection="linear",
        )
        return ModelConfig(vision, text, embed_dim=shapes[f"{_PROJECTION}.weight"][0])
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{where} has not the weights of dino.txt ({error})") from None


def _split(tensors: Tensors, depth: int) -> Tensors:
    """Split the queries, keys and values of the backbone; a bias of keys is masked by its code."""
    computed: dict[str, Computed] = {}
    used = [f"blocks.{n}.attn.qkv.{kind}" for n in range(depth) for kind in ("weight", "bias")]
    for name in used:
        rows, *rest = tensors.shapes.get(name, (0,))
        for number, part in enumerate(("query", "key", "value")):
            read = functools.partial(_third, tensors, name, number, rows // 3)
            computed[name.replace("qkv", part)] = (rows // 3, *rest), read
        if name.endswith("bias"):
            del computed[name.replace("qkv", "key")]
    return ComputedTensors(tensors, computed, used)


def _third(
    tensors: Tensors, name: str, number: int, count: int, start: int, stop: int | None
) -> np.ndarray:
    first = number * count
    return tensors.read(name, first + start, first + (count if stop is None else stop))


def rules() -> list[Rule]:
    """Rules of a model whose queries, keys and values of the backbone are split."""
    layer, ours = "blocks.{}", "vision.transformer.blocks"
    head, head_ours = f"{_HEAD}.blocks.{{}}", "vision.head.blocks"
    words, text = f"{_TEXT}.blocks.{{}}", "text.transformer.blocks"
    attention = {"attention.value": "attn.value", "attention.out": "attn.proj"}
    gated = {"mlp.gate": "mlp.w1", "mlp.up": "mlp.w2", "mlp.down": "mlp.w3"}
    return [
        Rule("logit_scale", "logit_scale", SCALAR_1),
        Rule("cls_token", "vision.class_token", leading(2)),
        Rule("storage_tokens", "vision.registers", leading(1)),
        *conv("patch_embed.proj", "vision.stem"),
        Rule(f"{layer}.attn.query.weight", f"{ours}.attention.query.kernel", paired(LINEAR)),
        Rule(f"{layer}.attn.query.bias", f"{ours}.attention.query.bias", paired(FLAT)),
        Rule(f"{layer}.attn.key.weight", f"{ours}.attention.key.kernel", paired(LINEAR)),
        *block(layer, ours, _SCALED | MLP | attention),
        *norm("norm", "vision.norm"),
        *fused(f"{head}.attn.qkv.", f"{head_ours}.attention", "query", "key", "value"),
        *block(head, head_ours, _SCALED | gated | {"attention.out": "attn.proj"}),
        *norm(f"{_HEAD}.ln_final", "vision.head_norm"),
        Rule(f"{_TEXT}.token_embedding.weight", "text.embedding"),
        Rule(f"{_TEXT}.positional_embedding", "text.position"),
        *fused(f"{words}.attention.qkv.", f"{text}.attention", "query", "key", "value"),
        *out(f"{words}.attention.proj", f"{text}.attention.out"),
        *norm(f"{words}.attention_norm", f"{text}.attention_norm"),
        *norm(f"{words}.ffn_norm", f"{text}.mlp_norm"),
        *linear(f"{words}.feed_forward.fc1", f"{text}.mlp.up"),
        *linear(f"{words}.feed_forward.fc2", f"{text}.mlp.down"),
        *norm(f"{_TEXT}.ln_final", "text.norm"),
        *linear(_PROJECTION, "text.projection", bias=False),
    ]
