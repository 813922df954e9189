"""big_vision's `.npz` files: SigLIP, SigLIP 2, and LiT with a text transformer or a BERT.

Layouts are ours, names differ: https://github.com/google-research/big_vision. The shapes give every
size but the heads of a BERT, and the code has one activation (tanh-GELU). The BERT is that of
flaxformer (https://github.com/google/flaxformer, architectures/bert) without its pooler.
"""

import math
import os
import re
import threading
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Shaped

from vlm.config import ModelConfig, PreprocessConfig, TextConfig, ViTConfig
from vlm.errors import CheckpointError, brief
from vlm.weights.checkpoint import Checkpoint
from vlm.weights.fields import MAX_LAYERS
from vlm.weights.files import npy_header
from vlm.weights.flax_layers import (
    MERGED,
    MERGED_OUT,
    attention,
    block,
    dense,
    encoder_sizes,
    mlp,
    norm,
)
from vlm.weights.rules import FLAT, SCALAR_1, WITHOUT_FIRST, Rule, Shapes, count_layers, leading
from vlm.weights.vocabularies import bert_tokenizer, big_vision_tokenizer

_MAX_MEMBERS, _MAX_INFLATION = 20_000, 8  # of an archive
_STACKED = re.compile(r"(.*/)encoderblock/(.*)")
_OLD_IMAGE_POSITION = (
    "img/Transformer/posembed_input/pos_embedding",
    "img/Transformer/pos_embedding",
)

_BERT = "txt/BertEncoder_0"
_BERT_LAYER = f"{_BERT}/encoder_block/layer_sequence/layers_{{}}"
_BERT_TABLES = f"{_BERT}/embedder/embedders_{{}}_ids/embedding"
_BERT_POSITION, _BERT_SEGMENT = _BERT_TABLES.format("position"), _BERT_TABLES.format("segment")
# Heads by width and depth. The kernels are (width, width), so shapes do not give the heads, and
# big_vision builds only these two.
BERT_HEADS = {(768, 12): 12, (1024, 24): 16}


class NpzFile:
    """Parameters of an `.npz`, with old forms of big_vision converted to the present one.

    - Names lose "params/", and one stacked `encoderblock` becomes `encoderblock_0`, `_1`, ...
    - bfloat16, which numpy saves as raw pairs of bytes, is restored.
    - A second position embedding of the text tower, which old files have, is added to the first.
    - So is the embedding of segment 0 of a BERT, to which all texts belong.
    - The first position of old vision towers is added to the class token.

    Raises:
        CheckpointError: the file is missing, corrupt, or no `.npz` of numbers.
    """

    def __init__(self, path: epath.PathLike):
        self.where = os.fspath(path)
        self._path = epath.Path(path)
        try:
            with self._path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                # The headers alone: an `.npz` is a zip of `.npy` files.
                members = _members(archive, self._path.stat().length)
        except FileNotFoundError:
            raise CheckpointError(f"there is no {path}: check the path") from None
        except Exception as error:  # a damaged archive fails in any way
            reason = brief(str(error))
            raise CheckpointError(
                f"{path} is corrupt or no .npz ({reason}): get it again"
            ) from None
        self._members: dict[str, tuple[str, int | None]] = {}  # our name: member, layer
        self.shapes: dict[str, tuple[int, ...]] = {}
        for member, shape in members.items():
            name = member.removeprefix("params/")
            if (match := _STACKED.fullmatch(name)) and shape:
                if shape[0] > MAX_LAYERS:
                    raise CheckpointError(f"{path} stacks {shape[0]:,} layers: get it again")
                for layer in range(shape[0]):
                    one = f"{match[1]}encoderblock_{layer}/{match[2]}"
                    self._members[one], self.shapes[one] = (member, layer), shape[1:]
            else:
                self._members[name], self.shapes[name] = (member, None), shape
        self._added = [
            name for name in self.shapes if re.fullmatch(r"txt/.+/(pos_embedding|posemb)", name)
        ]
        for name in self._added:
            del self.shapes[name]
        if _BERT_POSITION in self.shapes:
            wanted, segment_shape = (
                self.shapes[_BERT_POSITION][1:],
                self.shapes.pop(_BERT_SEGMENT, ()),
            )
            if segment_shape[1:] != wanted or 0 in segment_shape:
                raise CheckpointError(
                    f"{path} has no {_BERT_SEGMENT} as wide as its positions, which every BERT "
                    "has: get it again"
                )
        self._image_position()
        self._archive: Any = None
        self._lock = threading.Lock()
        # The last member that was read: its layers are read one after the other.
        self._held: tuple[str, Any] = ("", None)

    def _image_position(self) -> None:
        """Find positions in the encoder of old vision towers; the first is the class token's."""
        for old in _OLD_IMAGE_POSITION:
            if old in self.shapes and "img/pos_embedding" not in self.shapes:
                self.shapes["img/pos_embedding"] = self.shapes.pop(old)
                self._members["img/pos_embedding"] = self._members.pop(old)
        shape = self.shapes.get("img/pos_embedding", ())
        self._class_position = (
            "img/cls" in self.shapes
            and len(shape) == 3
            and math.isqrt(shape[1]) ** 2 == shape[1] - 1
        )
        if self._class_position:
            self.shapes["img/pos_embedding"] = (shape[0], shape[1] - 1, shape[2])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        array = self._one(name)
        if name == "txt/pos_embedding":
            for extra in self._added:
                array = array.astype(np.float32) + self._one(extra).astype(np.float32)
        if name == _BERT_POSITION:
            array = array.astype(np.float32) + self._one(_BERT_SEGMENT)[0].astype(np.float32)
        if self._class_position and name == "img/pos_embedding":
            array = array[:, 1:]
        if self._class_position and name == "img/cls":
            first = self._one("img/pos_embedding")[:, :1]
            array = array.astype(np.float32) + first.astype(np.float32)
        return array[start:stop] if array.ndim else array

    def _one(self, name: str) -> np.ndarray:
        with self._lock:  # the archive and the last member are shared
            return self._read_one(name)

    def _read_one(self, name: str) -> np.ndarray:
        member, layer = self._members[name]
        try:
            if self._archive is None:
                self._archive = np.load(self._path.open("rb"), allow_pickle=False)
            if self._held[0] != member:
                self._held = "", None  # before the next one is there
                self._held = member, self._archive[member]
        except Exception as error:
            raise CheckpointError(
                f"{self.where} is damaged in {brief(member)} ({brief(str(error))}): get it again"
            ) from None
        array = self._held[1]
        if array.dtype == np.dtype("V2"):
            array = array.view(ml_dtypes.bfloat16)
        return array if layer is None else array[layer]


def _members(archive: Any, file_size: int) -> dict[str, tuple[int, ...]]:
    """Read the shapes of an archive's members, without their data.

    Raises:
        ValueError: a corrupt member, or members that would inflate far beyond the file.
    """
    members, total = {}, 0
    if len(archive.files) > _MAX_MEMBERS:
        raise ValueError(f"it has {len(archive.files):,} members")
    for name in archive.files:
        with archive.zip.open(f"{name}.npy") as stream:
            shape, dtype = npy_header(stream)
        members[name] = shape
        total += math.prod(shape) * dtype.itemsize
    if total > _MAX_INFLATION * file_size + (64 << 20):
        raise ValueError(f"it would inflate from {file_size:,} bytes to {total:,}")
    return members


def recognises(path: epath.Path) -> bool:
    """Whether `path` may be one of big_vision's files."""
    return path.suffix == ".npz" and path.is_file()


def open_checkpoint(path: epath.Path) -> Checkpoint:
    """Open the checkpoint in a file, with the vocabulary beside it."""
    tensors = NpzFile(path)
    config = model_config(tensors.shapes, os.fspath(path))
    if config.text_transformer.norm == "post":
        tokenizer = bert_tokenizer(path, config)
    else:
        tokenizer = big_vision_tokenizer(path.parent, config)
    return Checkpoint(
        path.stem,
        config,
        preprocess_config(config.vision.image_size),
        tokenizer,
        tensors,
        rules(config),
        lambda name: name.startswith("opt/"),  # the optimizer's state
        "zoom",
        context_length=tokenizer.config.context_length,
    )


def model_config(shapes: Shapes, where: str) -> ModelConfig:
    """Configuration of a two-tower model of big_vision, from the shapes of its parameters.

    Raises:
        CheckpointError: it has no such towers, or a BERT whose heads are not known.
    """
    try:
        vision = _vision(shapes)
        text = _bert(shapes, where) if _BERT_POSITION in shapes else _text(shapes)
        embed_dim = shapes["txt/head/kernel"][1] if "txt/head/kernel" in shapes else text.width
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{where} is no two-tower model of big_vision ({error})") from None
    sigmoid = "b" in shapes
    return ModelConfig(
        vision,
        text,
        embed_dim=embed_dim,
        loss="sigmoid" if sigmoid else "softmax",
        init_bias=-10.0 if sigmoid else None,
    )


def preprocess_config(image_size: int) -> PreprocessConfig:
    """Preprocessing `resize(N)|value_range(-1, 1)`."""
    return PreprocessConfig(
        image_size=image_size, kernel="bilinear", backend="tensorflow", antialias=False
    )


def _vision(shapes) -> ViTConfig:
    patch_size, _, _, _ = shapes["img/embedding/kernel"]
    has_class = "img/cls" in shapes
    grid = math.isqrt(shapes["img/pos_embedding"][1])
    return ViTConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        **encoder_sizes(shapes, "img/Transformer"),
        activation="gelu_tanh",
        norm_eps=1e-6,
        pool="class" if has_class else "map" if "img/MAPHead_0/probe" in shapes else "mean",
        class_token=has_class,
        projection="linear_bias" if "img/head/kernel" in shapes else "none",
    )


def _text(shapes) -> TextConfig:
    _, context_length, _ = shapes["txt/pos_embedding"]
    vocab_size, _ = shapes["txt/Embed_0/embedding"]
    return TextConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        **encoder_sizes(shapes, "txt/Encoder_0"),
        activation="gelu_tanh",
        norm_eps=1e-6,
        pool="map" if "txt/MAPHead_0/probe" in shapes else "last",
        projection="linear_bias" if "txt/head/kernel" in shapes else "none",
    )


def _bert(shapes, where: str) -> TextConfig:
    """Configuration of a BERT pooled at its [CLS] token; padding, token 0, is masked."""
    context_length, width = shapes[_BERT_POSITION]
    vocab_size, _ = shapes[_BERT_TABLES.format("token")]
    depth = count_layers(shapes, f"{_BERT_LAYER}/mlp_block/layer_norm/scale")
    if (width, depth) not in BERT_HEADS:
        raise CheckpointError(
            f"{where} has a BERT of width {width} and {depth} layers, and the file does not give "
            "its heads: vlm supports those of BERT-Base (768, 12) and BERT-Large (1024, 24)"
        )
    return TextConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        width=width,
        depth=depth,
        heads=BERT_HEADS[width, depth],
        mlp_dim=shapes[_BERT_LAYER.format(0) + "/mlp_block/mlp/dense_layer/kernel"][1],
        norm="post",
        pool="first",
        pad_id=0,
        projection="linear_bias" if "txt/head/kernel" in shapes else "none",
        activation="gelu_tanh",
        norm_eps=1e-12,
    )


def rules(config: ModelConfig) -> list[Rule]:
    """Rules of a model."""
    vision, text = config.vision, config.text_transformer
    assert isinstance(vision, ViTConfig)  # big_vision has no other
    bias = [] if config.init_bias is None else [Rule("b", "logit_bias", SCALAR_1)]
    return [
        Rule("t", "logit_scale", SCALAR_1),
        *bias,
        *dense("img/embedding", "vision.stem"),
        *_position(vision),
        *_encoder("img/Transformer", "vision"),
        *_pool("img", "vision", vision.pool),
        *(dense("img/head", "vision.projection") if vision.projection != "none" else []),
        *(_bert_rules() if text.norm == "post" else _text_rules(text.pool)),
        *(dense("txt/head", "text.projection") if text.projection != "none" else []),
    ]


def _bert_rules() -> list[Rule]:
    ours, attention = "text.transformer.blocks", f"{_BERT_LAYER}/attention_block"
    mlp, heads = f"{_BERT_LAYER}/mlp_block", []
    for part in ("query", "key", "value"):
        theirs = f"{attention}/attention_layer/{part}"
        heads += dense(theirs, f"{ours}.attention.{part}", MERGED, FLAT)
    return [
        Rule(_BERT_TABLES.format("token"), "text.embedding"),
        Rule(_BERT_POSITION, "text.position"),
        *norm(f"{_BERT}/layer_norm", "text.embedding_norm"),
        *heads,
        *dense(f"{attention}/dense_layer", f"{ours}.attention.out", MERGED_OUT),
        *norm(f"{attention}/layer_norm", f"{ours}.attention_norm"),
        *dense(f"{mlp}/mlp/dense_layer", f"{ours}.mlp.up"),
        *dense(f"{mlp}/dense_layer", f"{ours}.mlp.down"),
        *norm(f"{mlp}/layer_norm", f"{ours}.mlp_norm"),
    ]


def _text_rules(pool: str) -> list[Rule]:
    return [
        Rule("txt/Embed_0/embedding", "text.embedding"),
        Rule("txt/pos_embedding", "text.position", leading(1)),
        *_encoder("txt/Encoder_0", "text"),
        *_pool("txt", "text", pool),
    ]


def _position(c: ViTConfig) -> list[Rule]:
    if c.class_token:
        return [
            Rule("img/cls", "vision.class_token", leading(2)),
            Rule("img/pos_embedding", "vision.position", WITHOUT_FIRST),
        ]
    return [Rule("img/pos_embedding", "vision.position", leading(1))]


def _encoder(theirs: str, ours: str) -> list[Rule]:
    return [
        *block(f"{theirs}/encoderblock_{{}}", f"{ours}.transformer.blocks"),
        *norm(f"{theirs}/encoder_norm", f"{ours}.norm"),
    ]


def _pool(theirs: str, ours: str, pool: str) -> list[Rule]:
    if pool != "map":
        return []
    head = f"{theirs}/MAPHead_0"
    return [
        Rule(f"{head}/probe", f"{ours}.pool.probe", leading(1)),
        *attention(f"{head}/MultiHeadDotProductAttention_0", f"{ours}.pool.attention"),
        *norm(f"{head}/LayerNorm_0", f"{ours}.pool.norm"),
        *mlp(f"{head}/MlpBlock_0", f"{ours}.pool.mlp"),
    ]
