"""Models of the Hugging Face Hub: the files that are needed, through its own cache."""

import errno
import os
import re
from collections.abc import Collection

from etils import epath

from vlm.errors import CheckpointError
from vlm.weights import huggingface, open_clip, transformers_folders
from vlm.weights.bundle_format import BUNDLE_FILE
from vlm.weights.checkpoint import shards, weight_names
from vlm.weights.fields import read_json

_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Which model it is; the first that a repository has is there whenever anything of it is.
_CONFIGS = (BUNDLE_FILE, "config.json", "open_clip_config.json")
_INPUTS = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id, OWNER/NAME, perhaps with open_clip's "hf-hub:"."""
    return bool(_ID.fullmatch(name.removeprefix("hf-hub:")))


def download(name: str, revision: str | None = None) -> tuple[epath.Path, str | None]:
    """The folder in the Hub's cache with the files of the model `name` that loading reads.

    They are fetched if they must be. If the Hub does not give them, what was cached before does,
    and the second value says why it was not asked.

    Raises:
        CheckpointError: there is no such model, no access to it, nothing in it that vlm reads, or
            no network and no copy.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import validate_repo_id

    name = name.removeprefix("hf-hub:")
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        raise CheckpointError(
            f"there is no folder {name!r}, and no Hub model can have that name: check the path"
        ) from None
    file = None
    try:
        # The client asks this without a limit of time, and may wait for a silent server forever.
        about = hub.HfApi().model_info(
            name, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        sizes = {sibling.rfilename: sibling.size for sibling in about.siblings or ()}

        def fetch(file: str) -> str:
            cached = hub.try_to_load_from_cache(name, file, revision=about.sha)
            size = sizes.get(file)
            torn = size is not None and isinstance(cached, str) and os.path.getsize(cached) != size
            return hub.hf_hub_download(name, file, revision=about.sha, force_download=torn)

        configs = [file for file in _CONFIGS if file in sizes]
        if not configs:
            raise CheckpointError(
                f"the Hub model {name!r} is not of a kind that vlm reads: it has none of "
                f"{', '.join(_CONFIGS)}"
            )
        inputs = [file for file in _INPUTS if file in sizes]
        if "tokenizer.json" in inputs and "tokenizer.model" in inputs:
            inputs.remove("tokenizer.model")  # of which the other was made
        parts = (*configs, *inputs)
        folder = [epath.Path(fetch(file)).parent for file in parts][-1]
        # The weights come last, so that they are not there without what belongs to them.
        file = _weights(name, folder, sizes.keys())
        path = fetch(file)
        if file.endswith(".index.json"):
            for shard in shards(epath.Path(path)):
                file = shard.name
                fetch(file)
        # Only now does the revision's name stand for this commit when there is no network.
        known = _cached(name, revision)
        if known is None or known.name != about.sha:
            hub.hf_hub_download(name, configs[0], revision=revision)
        return folder, None
    except CheckpointError:
        raise
    except Exception as error:  # the network fails in any way; the cache may still do
        if (cached := _cached(name, revision)) is not None:
            return cached, _reason(error)
        raise CheckpointError(_explain(error, name, revision, file)) from None


def _weights(name: str, folder: epath.Path, files: Collection[str]) -> str:
    """Of a repository's files, its weights or their index, as `open_checkpoint` will read them.

    Raises:
        CheckpointError: they are of another architecture, or there are none.
    """
    if BUNDLE_FILE in files:
        stems = huggingface.WEIGHTS[:1]
    elif "config.json" in files and transformers_folders.is_of_transformers(folder, files):
        # Refused here, another model's weights are not fetched in vain.
        values = read_json(folder / "config.json")
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
    """The folder in the Hub's cache that a revision stands for without the network."""
    import huggingface_hub as hub

    for file in _CONFIGS:
        path = hub.try_to_load_from_cache(name, file, revision=revision)
        if isinstance(path, str):
            return epath.Path(path).parent
    return None


def _reason(error: Exception) -> str:
    """What happened, on one line."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what the client met before it looked into its cache
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _explain(error: Exception, name: str, revision: str | None, file: str | None) -> str:
    """Why there is no model, in a sentence with the mend."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    place = os.path.join(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--"))
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
    if status is not None:
        what, mend = "the Hub answers with an error", "try again later"
    else:
        what, mend = "the Hub cannot be reached", "connect and try again"
    if constants.HF_HUB_OFFLINE:
        mend = "unset it and try again"
    if file is not None:
        return (
            f"{file} of the Hub model {name!r} did not arrive, as {what} ({reason}): what did is "
            f"kept under {place}; {mend}"
        )
    return (
        f"the model {name!r} is not on this disk, and {what} ({reason}): its config.json and "
        f"model.safetensors would be put under {place}; {mend}, or give the path of a folder that "
        "holds them"
    )
