"""Download of models from the Hugging Face Hub, through its cache.

A model is fetched once. Later loads use the same commit without a network: see `pins`.
"""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Collection, Iterator
from typing import Any

from etils import epath

from vlm.errors import CheckpointError, ConfigError
from vlm.weights import (
    catalogue,
    huggingface,
    open_clip,
    sentence_transformers,
    timm_folders,
    transformers_folders,
)
from vlm.weights.blobs import download_blob
from vlm.weights.bundle_format import BUNDLE_FILE
from vlm.weights.checkpoint import GGUF, shards, weight_names
from vlm.weights.fields import read_json
from vlm.weights.pins import Pin, hub_folder, pinned_folder, read_pin, write_pin
from vlm.weights.quantized_folders import QUANTO

_log = logging.getLogger(__name__)
_UNRECORDED = (
    "its commit cannot be recorded in the cache: set VLM_CACHE to a folder that you can write"
)
_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Files that identify the model. The first that a repository has is downloaded before all others.
_CONFIGS = (BUNDLE_FILE, "config.json", "open_clip_config.json", sentence_transformers.MODULES)
_INPUTS = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    QUANTO,
)
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


def is_hub_id(name: str) -> bool:
    """Return True if `name` has the form OWNER/NAME, with or without open_clip's "hf-hub:"."""
    return bool(_ID.fullmatch(name.removeprefix("hf-hub:")))


def download(name: str, revision: str | None = None) -> tuple[epath.Path, str | None]:
    """Download the files of a model that loading reads, unless they are cached.

    Args:
        revision: a branch, tag or commit. None: the commit that this machine fetched first, which
            needs no network once its files are cached; see `update`.

    Returns:
        The folder in the Hub's cache, and None. If the Hub fails and an older copy is cached: its
        folder, and the reason of the failure.

    Raises:
        CheckpointError: there is no such model, no access to it, no file that vlm reads, or no
            network and no cached copy.
    """
    name = name.removeprefix("hf-hub:")
    pin = read_pin(name) if revision is None else None
    if pin is not None and (folder := pinned_folder(name, pin)) is not None:
        return folder, None
    return _fetch(name, revision, pin)


def update(name: str) -> tuple[str | None, str]:
    """Fetch the newest commit of a model, which loads use from now on.

    Returns:
        The commit that loads used before, or None; and the newest one.

    Raises:
        CheckpointError: as `download`, or the Hub could not be reached.
    """
    name = name.removeprefix("hf-hub:")
    old = read_pin(name)
    _, offline = _fetch(name, None, None)
    new = read_pin(name)
    if offline is not None:
        raise CheckpointError(
            f"the model {name!r} is not updated, because the Hub could not be reached ({offline}): "
            "connect and try again"
        )
    if new is None:
        raise CheckpointError(f"the model {name!r} is not updated: {_UNRECORDED}")
    return None if old is None else old.commit, new.commit


def download_file(name: str, file: str, revision: str | None = None) -> epath.Path | None:
    """Download one small file of a Hub model, or return its cached copy without a network.

    Returns:
        Its path in the cache; None if the model has no such file.

    Raises:
        CheckpointError: there is no such model, no access to it, or no network and no copy.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        with _without_progress_bars():
            return epath.Path(hub.hf_hub_download(name, file, revision=revision))
    except Exception as error:  # a network fails in many ways
        missing = isinstance(error, errors.EntryNotFoundError)
        if missing and not isinstance(error, errors.LocalEntryNotFoundError):
            return None
        raise CheckpointError(_explain(error, name, revision, file)) from None


def _fetch(name: str, revision: str | None, pin: Pin | None) -> tuple[epath.Path, str | None]:
    """Download a revision, or the commit of `pin`; without a revision, record the commit."""
    import huggingface_hub as hub
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        raise CheckpointError(
            f"there is no folder {name!r}, and no Hub model can have that name: check the path"
        ) from None
    file = None
    wanted = revision if pin is None else pin.commit
    try:
        about = _about(name, wanted, newest=pin is not None)
        sizes = {sibling.rfilename: sibling.size for sibling in about.siblings or ()}
        fetched: dict[str, int] = {}

        def fetch(file: str) -> str:
            cached = hub.try_to_load_from_cache(name, file, revision=about.sha)
            size = sizes.get(file)
            truncated = (
                size is not None and isinstance(cached, str) and os.path.getsize(cached) != size
            )
            path = hub.hf_hub_download(name, file, revision=about.sha, force_download=truncated)
            fetched[file] = os.path.getsize(path)
            return path

        configs = [file for file in _CONFIGS if file in sizes]
        if not configs and any(file.endswith(".gguf") for file in sizes):
            raise CheckpointError(f"the Hub model {name!r} {GGUF}")
        if not configs:
            raise CheckpointError(
                f"the Hub model {name!r} is not of a kind that vlm reads: it has none of "
                f"{', '.join(_CONFIGS)}"
            )
        inputs = [file for file in _INPUTS if file in sizes]
        if "tokenizer.json" in inputs and "tokenizer.model" in inputs:
            inputs.remove("tokenizer.model")  # the source of tokenizer.json
        with _without_progress_bars():  # small files
            folder = [epath.Path(fetch(file)).parent for file in (*configs, *inputs)][-1]
            modules = sentence_transformers.modules(folder, sizes.keys(), (*_CONFIGS, *_INPUTS))
            for file in modules.settings:
                fetch(file)
            # Weights come last: no copy has weights without their config.
            beside = [f.removeprefix(modules.root) for f in sizes if f.startswith(modules.root)]
            file = modules.root + _weights(name, folder / modules.root, beside, modules.of_text)
            files = [file]
            if file.endswith(".index.json"):
                files = [modules.root + s.name for s in shards(epath.Path(fetch(file)))]
            files += modules.weights
        if any(not (folder / file).exists() for file in files):
            _announce(name, about, sum(sizes.get(file) or 0 for file in files))
        for file in files:
            download_blob(name, file, about.sha)
            fetch(file)
        # Only now the cache maps the revision's name to this commit, for use without a network.
        known = _cached(name, revision)
        if about.sha != wanted and (known is None or known.name != about.sha):
            hub.hf_hub_download(name, configs[0], revision=revision)
        if revision is None:
            try:
                write_pin(name, Pin(about.sha, fetched))
            except (OSError, ConfigError) as error:
                _log.warning("%s: %s (%s)", name, _UNRECORDED, error)
        return folder, None
    except CheckpointError:
        raise
    except Exception as error:  # a network fails in many ways; use the cache
        if (cached := _cached(name, wanted)) is not None:
            return cached, _reason(error)
        raise CheckpointError(_explain(error, name, revision, file)) from None


def _about(name: str, revision: str | None, *, newest: bool) -> Any:
    """Ask the Hub for the files of a revision, or of the newest one if that commit is gone."""
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    # The client has no default timeout here, and could wait for a silent server forever.
    options: dict[str, Any] = {"files_metadata": True, "timeout": constants.HF_HUB_ETAG_TIMEOUT}
    try:
        return hub.HfApi().model_info(name, revision=revision, **options)
    except errors.RevisionNotFoundError:
        if not newest:
            raise
        _log.warning("the Hub has no commit %s of %s any more: fetching the newest", revision, name)
        return hub.HfApi().model_info(name, **options)


def _announce(name: str, about: Any, size: int) -> None:
    """Log the name, size and licence of a model whose weights are about to be downloaded."""
    from huggingface_hub import constants

    entry = catalogue.resolve(name)
    licence = entry.licence if entry is not None and entry.name == name else None
    tags = (tag.removeprefix("license:") for tag in about.tags or () if tag.startswith("license:"))
    licence = licence or next(tags, "not stated")
    _log.info(
        "fetching %s from the Hub (%s MB, licence %s) to %s; later commands use this copy",
        name, f"{size / 1e6:,.0f}", licence, constants.HF_HUB_CACHE,
    )  # fmt: skip


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Context manager that hides the Hub's progress bars."""
    from huggingface_hub import utils

    hidden = utils.are_progress_bars_disabled()
    if not hidden:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            utils.enable_progress_bars()


def _weights(name: str, folder: epath.Path, files: Collection[str], of_text: bool) -> str:
    """Return the name of the weights file, or of its index, that `open_checkpoint` reads.

    `of_text` is for a text encoder of sentence-transformers.

    Raises:
        CheckpointError: vlm does not have the architecture, or there are no weights.
    """
    if BUNDLE_FILE in files:
        stems = huggingface.WEIGHTS[:1]
    elif "config.json" in files and transformers_folders.is_of_transformers(folder, files):
        # Check the architecture before downloading the weights.
        values = read_json(folder / "config.json")
        if of_text:
            sentence_transformers.check_encoder(values, f"config.json of {name}")
        elif timm_folders.describes(values):
            timm_folders.check_name(values, f"config.json of {name}")
        else:
            transformers_folders.model_config(values, f"config.json of {name}")
        stems = huggingface.WEIGHTS
    else:
        stems = open_clip.WEIGHTS
    for file in weight_names(*stems):
        if file in files:
            return file
    raise CheckpointError(
        f"the Hub model {name!r} has no {stems[0]}.safetensors and no {stems[-1]}.bin: vlm reads "
        "these formats of weights, so choose a model that has one of them"
    )


def _cached(name: str, revision: str | None) -> epath.Path | None:
    """Return the cached folder of a revision, or None."""
    import huggingface_hub as hub

    for file in _CONFIGS:
        path = hub.try_to_load_from_cache(name, file, revision=revision)
        if isinstance(path, str):
            return epath.Path(path).parent
    return None


def _reason(error: Exception) -> str:
    """Return the cause of a failed download, on one line."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the network error that made the client look in its cache
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _explain(error: Exception, name: str, revision: str | None, file: str | None) -> str:
    """Return the message for a failed download, with the fix."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    place = os.path.join(constants.HF_HUB_CACHE, hub_folder(name))
    reason = _reason(error)
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"the model {name!r} asks for your consent: accept its terms at {page} and log in with "
            "`hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no folder and no Hub model {name!r}: check the name, or log in with "
            "`hf auth login` if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"the Hub model {name!r} has no revision {revision!r}: choose a branch, tag or commit "
            f"of {page}/commits/main"
        )
    if status in (401, 403):
        return (
            f"the Hub does not let you read the model {name!r} ({reason}): log in with "
            "`hf auth login`, or set HF_TOKEN, to a token that may read it"
        )
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return (
            f"{file or 'the model'} of the Hub model {name!r} cannot be written under {place} "
            f"({os.strerror(error.errno)}): make room there, or set HF_HOME to a folder that you "
            "can write"
        )
    what = "the Hub cannot be reached" if status is None else "the Hub answers with an error"
    fix = "connect and try again" if status is None else "try again later"
    if constants.HF_HUB_OFFLINE:
        fix = "unset it and try again"
    if file is not None:
        return (
            f"{file} of the Hub model {name!r} did not arrive, as {what} ({reason}): "
            f"complete files are kept under {place}; {fix}"
        )
    return (
        f"the model {name!r} is not on this disk, and {what} ({reason}): {fix}; or run "
        f"`hf download {name}` elsewhere and copy it to {place}; or give a folder with its files "
        "as the model"
    )
