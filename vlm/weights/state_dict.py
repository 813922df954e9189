"""State dicts of open_clip's architectures: files of its trainer, or of others, without a config.

The architecture is given by name. `open_clip_architectures.json` has the model_cfg of every
image-text architecture of open_clip's main branch, one on each line; open_clip's MIT licence holds
for it. Preprocessing is open_clip's default for a local file, and the log tells it.
"""

import difflib
import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

from etils import epath

from vlm.errors import CheckpointError, ConfigError
from vlm.weights import open_clip
from vlm.weights.checkpoint import Checkpoint
from vlm.weights.files import SafetensorsFile
from vlm.weights.torch_pickle import TorchFile

_LOG = logging.getLogger(__name__)
_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


@functools.cache
def architectures() -> dict[str, dict[str, Any]]:
    """The `model_cfg` of each architecture, by open_clip's name."""
    return json.loads((Path(__file__).parent / "open_clip_architectures.json").read_text())


def find_architecture(name: str) -> str:
    """Return open_clip's name of an architecture; case is ignored, and "_", "/" and "-" are equal.

    Raises:
        ConfigError: there is none; the message lists similar names.
    """
    known = {_plain(architecture): architecture for architecture in architectures()}
    if (found := known.get(_plain(name))) is not None:
        return found
    near = [known[close] for close in difflib.get_close_matches(_plain(name), known, n=5)]
    hint = f"choose {', '.join(near)}" if near else "use one such as ViT-B-32"
    raise ConfigError(f"open_clip has no architecture {name!r}: {hint}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace("/", "-")


def open_state_dict(path: epath.Path, architecture: str) -> Checkpoint:
    """Open a file of weights of an architecture.

    Tokenizers that are not CLIP's own are read from the files beside it.

    Raises:
        CheckpointError: no such file, it identifies another architecture, or it does not fit.
        ConfigError: an unknown `architecture`.
    """
    name = find_architecture(architecture)
    if not path.is_file() or path.suffix not in _ENDINGS:
        raise CheckpointError(
            f"architecture {name!r} is for a file of weights ({', '.join(_ENDINGS)}), which "
            f"{os.fspath(path)!r} is not: leave it out, or give such a file"
        )
    tensors = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
    script = isinstance(tensors, TorchFile) and tensors.is_script
    if script or "input_resolution" in tensors.shapes:
        raise CheckpointError(
            f"{path} is a file of OpenAI's, which identifies its own architecture: leave "
            f"architecture {name!r} out"
        )
    values, where = architectures()[name], f"{path} as {name}"
    checkpoint = open_clip.described(path.parent, values, {}, tensors, where, name=path.stem)
    _LOG.info(
        "%s has no preprocessing of its own: it uses open_clip's default for a local file, %s",
        path,
        checkpoint.preprocess,
    )
    return checkpoint
