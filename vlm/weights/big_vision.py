"""big_vision's `.npz` files: SigLIP, SigLIP 2 and LiT with a text transformer.

Their layout is ours but for names: https://github.com/google-research/big_vision. The shapes say
every size, and the code has one activation (tanh-GELU) and one epsilon.
"""

import math
import os
import re
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Shaped

from vlm.config import ModelConfig, PreprocessConfig, TextConfig, VisionConfig
from vlm.errors import CheckpointError
from vlm.weights.rules import SCALAR_1, Rule, Transform, leading

_STACKED = re.compile(r"(.*/)encoderblock/(.*)")
_IMAGE_BLOCK = r"img/Transformer/encoderblock_\d+/LayerNorm_0/scale"
_TEXT_BLOCK = r"txt/Encoder_0/encoderblock_\d+/LayerNorm_0/scale"


class NpzFile:
    """The parameters of an `.npz`, as big_vision names them, with its history ironed out.

    Names lose "params/"; one stacked `encoderblock` appears as `encoderblock_0`, `_1`, ...;
    bfloat16, which numpy saves as raw pairs of bytes, is bfloat16 again; and a second position
    embedding of the text tower, which old files carry, is added to the first.

    Raises:
        CheckpointError: the file is missing, torn, or no `.npz` of numbers.
    """

    def __init__(self, path: epath.PathLike):
        self.where = os.fspath(path)
        self._path = epath.Path(path)
        try:
            with self._path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                # The headers alone: an `.npz` is a zip of `.npy` files.
                members = {name: _header(archive, name) for name in archive.files}
        except FileNotFoundError:
            raise CheckpointError(f"there is no {path}: check the path") from None
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
            raise CheckpointError(f"{path} is torn or no .npz ({error}): get it again") from None
        self._members: dict[str, tuple[str, int | None]] = {}  # our name: member, layer
        self.shapes: dict[str, tuple[int, ...]] = {}
        for member, shape in members.items():
            name = member.removeprefix("params/")
            if match := _STACKED.fullmatch(name):
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
        self._archive: Any = None
        self._held: tuple[str, Any] = (
            "",
            None,
        )  # the last member: its layers are asked for in turn

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        array = self._one(name)
        if name == "txt/pos_embedding":
            for extra in self._added:
                array = array.astype(np.float32) + self._one(extra).astype(np.float32)
        return array[start:stop] if array.ndim else array

    def _one(self, name: str) -> np.ndarray:
        member, layer = self._members[name]
        try:
            if self._archive is None:
                self._archive = np.load(self._path.open("rb"), allow_pickle=False)
            if self._held[0] != member:
                self._held = "", None  # before the next one is there
                self._held = member, self._archive[member]
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{self.where} ends inside {member} ({error})") from None
        array = self._held[1]
        if array.dtype == np.dtype("V2"):
            array = array.view(ml_dtypes.bfloat16)
        return array if layer is None else array[layer]


def _header(archive, name: str) -> tuple[int, ...]:
    """The shape of a member, without its data."""
    with archive.zip.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        if version[0] > 1:
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        if dtype.hasobject:
            raise ValueError(f"{name} holds objects, not numbers")
        return shape


def model_config(shapes: dict[str, tuple[int, ...]], where: str) -> ModelConfig:
    """The configuration of a big_vision two-tower model, from the shapes of its parameters.

    Raises:
        CheckpointError: it has no such towers, or a text tower of another kind (BERT).
    """
    if any(name.startswith("txt/BertModel") for name in shapes):
        raise CheckpointError(f"{where} has a BERT as its text tower, which vlm does not read")
    try:
        vision = _vision(shapes)
        _, context_length, width = shapes["txt/pos_embedding"]
        vocab_size, _ = shapes["txt/Embed_0/embedding"]
        text = TextConfig(
            vocab_size=vocab_size,
            context_length=context_length,
            **_tower(shapes, "txt/Encoder_0", _TEXT_BLOCK),
            pool="map" if "txt/MAPHead_0/probe" in shapes else "last",
            projection="linear_bias" if "txt/head/kernel" in shapes else "none",
        )
        embed_dim = shapes["txt/head/kernel"][1] if "txt/head/kernel" in shapes else width
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
    """`resize(N)|value_range(-1, 1)`: TensorFlow's bilinear resizing, without antialias."""
    return PreprocessConfig(
        image_size=image_size, kernel="bilinear", backend="tensor", antialias=False
    )


def _vision(shapes) -> VisionConfig:
    patch_size, _, _, _ = shapes["img/embedding/kernel"]
    has_class = "img/cls" in shapes
    grid = math.isqrt(shapes["img/pos_embedding"][1])
    return VisionConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        **_tower(shapes, "img/Transformer", _IMAGE_BLOCK),
        pool="class" if has_class else "map" if "img/MAPHead_0/probe" in shapes else "mean",
        class_token=has_class,
        projection="linear_bias" if "img/head/kernel" in shapes else "none",
    )


def _tower(shapes, encoder: str, block: str) -> dict[str, Any]:
    query = shapes[f"{encoder}/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"]
    return {
        "width": query[0],
        "depth": sum(bool(re.fullmatch(block, name)) for name in shapes),
        "heads": query[1],
        "mlp_dim": shapes[f"{encoder}/encoderblock_0/MlpBlock_0/Dense_0/kernel"][1],
        "activation": "gelu_tanh",
        "norm_eps": 1e-6,
    }


# --------------------------------------------------------------------- their names and ours


def rules(config: ModelConfig) -> list[Rule]:
    """The table for a model of this configuration."""
    bias = [] if config.init_bias is None else [Rule("b", "logit_bias", SCALAR_1)]
    return [
        Rule("t", "logit_scale", SCALAR_1),
        *bias,
        *_dense("img/embedding", "vision.stem"),
        *_position(config.vision),
        *_encoder("img/Transformer", "vision"),
        *_pool("img", "vision", config.vision.pool),
        *(_dense("img/head", "vision.projection") if config.vision.projection != "none" else []),
        Rule("txt/Embed_0/embedding", "text.embedding"),
        Rule("txt/pos_embedding", "text.position", leading(1)),
        *_encoder("txt/Encoder_0", "text"),
        *_pool("txt", "text", config.text.pool),
        *(_dense("txt/head", "text.projection") if config.text.projection != "none" else []),
    ]


# Their class token has no position; ours has the first row, which is then zero.
_WITHOUT_FIRST = Transform(
    lambda s: (1, s[0] - 1, s[1]),
    lambda x, s: np.concatenate([np.zeros_like(x[0, :1]), x[0]]),
    lambda x: x[None, 1:],
)


def _position(c: VisionConfig) -> list[Rule]:
    if c.class_token:
        return [
            Rule("img/cls", "vision.class_token", leading(2)),
            Rule("img/pos_embedding", "vision.position", _WITHOUT_FIRST),
        ]
    return [Rule("img/pos_embedding", "vision.position", leading(1))]


def _dense(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}/kernel", f"{ours}.kernel"), Rule(f"{theirs}/bias", f"{ours}.bias")]


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}/scale", f"{ours}.scale"), Rule(f"{theirs}/bias", f"{ours}.bias")]


def _attention(theirs: str, ours: str) -> list[Rule]:
    names = ("query", "key", "value", "out")
    return [rule for name in names for rule in _dense(f"{theirs}/{name}", f"{ours}.{name}")]


def _mlp(theirs: str, ours: str) -> list[Rule]:
    up, down = (
        _dense(f"{theirs}/Dense_0", f"{ours}.up"),
        _dense(f"{theirs}/Dense_1", f"{ours}.down"),
    )
    return [*up, *down]


def _encoder(theirs: str, ours: str) -> list[Rule]:
    layer, block = f"{theirs}/encoderblock_{{}}", f"{ours}.transformer.blocks"
    return [
        *_norm(f"{layer}/LayerNorm_0", f"{block}.attention_norm"),
        *_attention(f"{layer}/MultiHeadDotProductAttention_0", f"{block}.attention"),
        *_norm(f"{layer}/LayerNorm_1", f"{block}.mlp_norm"),
        *_mlp(f"{layer}/MlpBlock_0", f"{block}.mlp"),
        *_norm(f"{theirs}/encoder_norm", f"{ours}.norm"),
    ]


def _pool(theirs: str, ours: str, pool: str) -> list[Rule]:
    if pool != "map":
        return []
    head = f"{theirs}/MAPHead_0"
    return [
        Rule(f"{head}/probe", f"{ours}.pool.probe", leading(1)),
        *_attention(f"{head}/MultiHeadDotProductAttention_0", f"{ours}.pool.attention"),
        *_norm(f"{head}/LayerNorm_0", f"{ours}.pool.norm"),
        *_mlp(f"{head}/MlpBlock_0", f"{ours}.pool.mlp"),
    ]


def ignored(name: str) -> bool:
    """The optimizer's state, in a file that carries it."""
    return name.startswith("opt/")
