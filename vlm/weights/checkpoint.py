"""What a checkpoint says about itself, and the files of a folder that hold its parameters."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from etils import epath

from vlm.config import ModelConfig, PreprocessConfig
from vlm.errors import CheckpointError
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights.fields import fields, read_json, show
from vlm.weights.files import SafetensorsFile, Shards, Tensors
from vlm.weights.resolution import Positions, TextPositions
from vlm.weights.rules import Rule
from vlm.weights.torch_pickle import TorchFile

_SHARD = re.compile(r"\w[\w.-]*")  # no path, so that nothing outside the folder is read


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says about itself; its tensors are not read yet.

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
    context_length: int | None = None  # that it is used with, where it has positions for more
    fingerprint: str | None = None  # of the parameters, where they carry one
    longer: "Checkpoint | None" = None  # for longer texts, where a family embeds them otherwise

    def for_length(self, context_length: int | None) -> "Checkpoint":
        """Itself, or what it has for texts of so many tokens."""
        if context_length is None or context_length <= self.config.text.context_length:
            return self
        return self.longer or self


def weights(folder: epath.Path, *stems: str) -> Tensors:
    """The tensors of `STEM.safetensors` or `STEM.bin`, whole or in the shards that an index lists.

    Raises:
        CheckpointError: none of them is there, or a shard is missing.
    """
    for name in weight_names(*stems):
        file = folder / name
        if not file.exists():
            continue
        files = shards(file) if name.endswith(".index.json") else [file]
        kind = SafetensorsFile if ".safetensors" in name else TorchFile
        return Shards([kind(file) for file in files])
    wanted = " or ".join(f"{stem}.safetensors" for stem in stems)
    raise CheckpointError(f"{folder} has no {wanted}: the download is incomplete")


def weight_names(*stems: str) -> Iterator[str]:
    """What a folder's weights may be called, best first: whole, or the index of their shards."""
    for ending in ("safetensors", "bin"):
        for stem in stems:
            yield f"{stem}.{ending}"
            yield f"{stem}.{ending}.index.json"


def shards(index: epath.Path) -> list[epath.Path]:
    """The files that an index lists, in their order.

    Raises:
        CheckpointError: it lists none, or something other than the names of files beside it.
    """
    names = list(fields(read_json(index).get("weight_map"), f"{index}: weight_map").values())
    for name in names:
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CheckpointError(
                f"{index} names the shard {show(name)}: a shard is a file beside its index, so "
                "download it again"
            )
    if not names:
        raise CheckpointError(f"{index} lists no shards: download it again")
    return [index.parent / name for name in sorted(set(names))]
