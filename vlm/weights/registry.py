"""Registry of checkpoint families: opens a model by path or Hub id.

A family is a module with two functions. `recognises(path)` looks at the names in a folder or at the
name of a file. `open_checkpoint(path)` describes the model: config, rules, preprocessing and
tokenizer; it raises a CheckpointError if the checkpoint is incomplete, corrupt or contradictory, or
of an architecture that vlm does not have. A new family is one such module, listed in `FAMILIES`.
"""

import logging
import os

from etils import epath

from vlm.errors import CheckpointError, ConfigError
from vlm.paths import as_path, on_disk
from vlm.weights import (
    adapter,
    big_vision,
    bundle_format,
    catalogue,
    open_clip,
    openai,
    openvision,
    peft,
    sentence_transformers,
    state_dict,
    timm_folders,
    tips_npz,
    transformers_folders,
)
from vlm.weights.adapter import SavedAdapter
from vlm.weights.checkpoint import GGUF, Checkpoint
from vlm.weights.hub import download, is_hub_id

_log = logging.getLogger(__name__)

FAMILIES = (
    bundle_format,
    sentence_transformers,
    timm_folders,
    transformers_folders,
    openvision,
    open_clip,
    openai,
    tips_npz,
    big_vision,
)  # the first that recognises it opens


def open_model(
    model: epath.PathLike, revision: str | None, architecture: str | None = None
) -> tuple[Checkpoint, str]:
    """Open the checkpoint that `model` names, and return it with its name.

    `model` is a local path, a name that `catalogue.resolve` knows, or another Hub id; with an
    `architecture`, it is a local file of weights.

    Raises:
        CheckpointError: there is none, or one that is corrupt or of another architecture.
        ConfigError: an unknown `architecture`.
    """
    if architecture is not None:
        checkpoint = state_dict.open_state_dict(as_path(model), architecture)
        return checkpoint, checkpoint.name
    try:
        path = as_path(model)
    except ConfigError as error:
        hub = os.fspath(model).partition("huggingface.co/")[2].rstrip("/")
        fix = f", or its Hub id: {hub!r}" if is_hub_id(hub) else ""
        raise CheckpointError(f"{error}{fix}") from None
    if path.exists():
        checkpoint = open_checkpoint(path)
        return checkpoint, checkpoint.name
    name = hub_name(model)
    if not is_hub_id(name):
        near = catalogue.similar(name)
        fix = f", or use a name of `vlm models` such as {', '.join(near)}" if near else ""
        raise CheckpointError(f"there is no model {name!r}: check the path{fix}")
    if name != os.fspath(model).removeprefix("hf-hub:"):
        _log.info("%s is %s", model, name)
    path, offline = download(name, revision)
    try:
        return open_checkpoint(path), name
    except CheckpointError as error:
        if offline is None:
            raise
        raise CheckpointError(
            f"{error} (these are the cached files of {name}, because the Hub could not be "
            f"reached: {offline})"
        ) from None


def hub_name(model: epath.PathLike) -> str:
    """Return the full Hub name of a name that `catalogue.resolve` knows; else `model` itself."""
    name = os.fspath(model)
    entry = catalogue.resolve(name)
    return name if entry is None or not is_hub_id(entry.name) else entry.name


def source_of(model: epath.PathLike) -> str:
    """Name of the same model for `open_model`, valid in any working directory."""
    path = as_path(model)
    return os.fspath(on_disk(path)) if path.exists() else hub_name(model)


def open_adapter(path: epath.PathLike) -> SavedAdapter | None:
    """Open the adapter in a local folder, ours or peft's; None if it is no adapter.

    Raises:
        CheckpointError: it is corrupt, or of a kind that is not supported.
    """
    try:
        path = as_path(path)
    except ConfigError:  # an address, about which `open_model` raises an error
        return None
    for form, opened in ((adapter, adapter.open_adapter), (peft, peft.open_peft)):
        if form.recognises(path):
            return opened(path)
    return None


def describe(model: epath.PathLike) -> tuple[Checkpoint, int | None, int | None]:
    """Open a model or the base of an adapter, without reading tensors.

    Returns:
        The checkpoint, and the image size and context length of its use; None: its own.

    Raises:
        CheckpointError: as `open_model`, or an adapter that does not name its base.
    """
    saved = open_adapter(model)
    if saved is None:
        checkpoint, _ = open_model(model, None)
        return checkpoint, checkpoint.image_size, checkpoint.context_length
    if saved.origin.base is None:
        raise CheckpointError(
            f"the adapter {model!r} does not name its base model: merge and save it first"
        )
    checkpoint, _ = open_model(saved.origin.base, None)
    size = checkpoint.image_size if saved.preprocess is None else saved.preprocess.image_size
    length = saved.context_length or checkpoint.context_length
    return checkpoint.for_length(length), size, length


def is_model(path: epath.Path) -> bool:
    """Return True if a file or folder looks like a checkpoint, a run or an adapter."""
    return any(family.recognises(path) for family in (*FAMILIES, adapter, peft))


def open_checkpoint(path: epath.Path) -> Checkpoint:
    """Open the checkpoint in a local folder or file.

    Raises:
        CheckpointError: no family recognises it, or it is incomplete, corrupt or contradictory.

    Example:
        >>> from etils import epath
        >>> model.save(folder / "my-model")
        >>> checkpoint = vlm.weights.open_checkpoint(epath.Path(folder / "my-model"))
        >>> checkpoint.preprocess.image_size  # known before any tensor is read
        16
    """
    for family in FAMILIES:
        if family.recognises(path):
            return family.open_checkpoint(path)
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        raise CheckpointError(f"{path} {GGUF}")
    raise CheckpointError(
        f"{path} is not a model: it has none of {bundle_format.BUNDLE_FILE}, config.json, "
        "open_clip_config.json"
    )
