"""A checkpoint's description, and the files of a folder that hold its parameters."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath
from jaxtyping import Shaped

from vlm.config import ModelConfig, PreprocessConfig
from vlm.errors import CheckpointError, brief
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights.fields import fields, read_json
from vlm.weights.files import SafetensorsFile, Shards, Tensors
from vlm.weights.quantized_folders import dequantized
from vlm.weights.resolution import Positions, TextPositions
from vlm.weights.rules import Rule, count_layers
from vlm.weights.torch_pickle import TorchFile

GGUF = (
    "is in GGUF, which lacks the logit scale and the tokenizer's merges of a CLIP (clip.cpp), or "
    "its text tower and projections (llama.cpp's mmproj): load the model that it was converted from"
)
_SHARD = re.compile(r"\w[\w.-]*")  # no path, so that nothing outside the folder is read


@dataclass(frozen=True)
class Checkpoint:
    """Description of a checkpoint, whose tensors are not read yet.

    Example:
        >>> from etils import epath
        >>> model.save(folder / "a-bundle")
        >>> checkpoint = vlm.weights.open_checkpoint(epath.Path(folder / "a-bundle"))
        >>> checkpoint.config.embed_dim
        16
    """

    name: str
    config: ModelConfig
    preprocess: PreprocessConfig
    tokenizer: Tokenizer
    tensors: Tensors
    rules: Sequence[Rule]
    ignored: Callable[[str], bool]
    positions: Positions  # how the family resizes its position embeddings: of images ...
    text_positions: TextPositions = "cut"  # ... and of texts
    context_length: int | None = None  # default, if the model has positions for more
    fingerprint: str | None = None  # of the parameters, if stored
    image_size: int | None = None  # default, if the processor's is not that of the positions
    longer: "Checkpoint | None" = None  # for longer texts, if the family embeds them differently

    def __post_init__(self):
        if self.tokenizer.vocab_size > self.config.text.vocab_size:
            raise CheckpointError(
                f"{self.tensors.where}: its tokenizer has {self.tokenizer.vocab_size:,} tokens and "
                f"its embedding table {self.config.text.vocab_size:,} rows: they belong to "
                "different models"
            )

    def for_length(self, context_length: int | None) -> "Checkpoint":
        """The checkpoint to use for texts of `context_length` tokens: itself or `longer`."""
        if context_length is None or context_length <= self.config.text.context_length:
            return self
        return self.longer or self


# Shape of a computed tensor, and the function that computes its rows `start:stop`.
Computed = tuple[tuple[int, ...], Callable[[int, int | None], np.ndarray]]


class ComputedTensors:
    """Tensors of a checkpoint, some of which are computed from others when they are read.

    Those that are `used` only to compute others are left out of `shapes`.
    """

    def __init__(
        self, tensors: Tensors, computed: Mapping[str, Computed], used: Collection[str] = ()
    ):
        self.where = tensors.where
        self._tensors, self._computed = tensors, computed
        self.shapes = {name: shape for name, shape in tensors.shapes.items() if name not in used}
        self.shapes |= {name: shape for name, (shape, _) in computed.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        if name not in self._computed:
            return self._tensors.read(name, start, stop)
        shape, rows = self._computed[name]
        return rows(start, shape[0] if stop is None and shape else stop)


def with_zero_biases(
    tensors: Tensors, rules: Sequence[Rule], off: Callable[[str], bool]
) -> Tensors:
    """Add biases of zero for layers whose name in the file is `off`, as their config says."""
    computed: dict[str, Computed] = {}
    for rule in rules:
        if not rule.theirs.endswith(".bias") or not off(rule.theirs):
            continue
        weight = rule.theirs.removesuffix("bias") + "weight"
        count = count_layers(tensors.shapes, weight) if "{}" in weight else 1
        for layer in range(count):
            name, shape = rule.theirs.format(layer), tensors.shapes.get(weight.format(layer))
            if shape is not None and name not in tensors.shapes:
                zeros = np.zeros(shape[0], np.float32)
                computed[name] = (zeros.shape, lambda start, stop, x=zeros: x[start:stop])
    return ComputedTensors(tensors, computed) if computed else tensors


def with_clamped_scale(tensors: Tensors, name: str, largest: float) -> Tensors:
    """Clamp the stored logarithm of a logit scale to 0 to `largest`, as the original code does."""

    def scale(start: int, stop: int | None) -> np.ndarray:
        return np.asarray(np.clip(tensors.read(name), 0, largest), np.float32)

    found = tensors.shapes.get(name) == ()
    return ComputedTensors(tensors, {name: ((), scale)}) if found else tensors


def float32_rows(tensors: Tensors, name: str, start: int, stop: int | None) -> np.ndarray:
    """Rows of a table in float32."""
    return tensors.read(name, start, stop).astype(np.float32)


def weights(folder: epath.Path, *stems: str) -> Tensors:
    """Open `STEM.safetensors` or `STEM.bin`, or the shards that its index lists.

    Quantized weights are read as float32.

    Raises:
        CheckpointError: none of them is there, or a shard is missing, or quantized weights in a
            layout that vlm does not read.
    """
    for name in weight_names(*stems):
        file = folder / name
        if not file.exists():
            continue
        files = shards(file) if name.endswith(".index.json") else [file]
        kind = SafetensorsFile if ".safetensors" in name else TorchFile
        return dequantized(Shards([kind(file) for file in files]), folder)
    wanted = " or ".join(f"{stem}.safetensors" for stem in stems)
    raise CheckpointError(f"{folder} has no {wanted}: the download is incomplete")


def weight_names(*stems: str) -> Iterator[str]:
    """Possible names of a folder's weights or of the index of their shards, best first."""
    for ending in ("safetensors", "bin"):
        for stem in stems:
            yield f"{stem}.{ending}"
            yield f"{stem}.{ending}.index.json"


def shards(index: epath.Path) -> list[epath.Path]:
    """Files that an index lists, sorted.

    Raises:
        CheckpointError: it lists none, or something other than the names of files beside it.
    """
    names = list(fields(read_json(index).get("weight_map"), f"{index}: weight_map").values())
    for name in names:
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CheckpointError(
                f"{index} names the shard {brief(name)}: a shard is a file beside its index, so "
                "download it again"
            )
    if not names:
        raise CheckpointError(f"{index} lists no shards: download it again")
    return [index.parent / name for name in sorted(set(names))]
