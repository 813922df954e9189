"""Models of the Hugging Face Hub: the files that are needed, through its own cache."""

import os
import re

from etils import epath

from vlm.errors import CheckpointError

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL = re.compile(r"[^/]+\.(json|txt|model)")  # configurations and vocabularies, top level alone
# Weights, best first: a repository often holds the same in several formats.
_WEIGHTS = (
    re.compile(r"model(-\d+-of-\d+)?\.safetensors"),
    re.compile(r"open_clip_(pytorch_)?model\.safetensors"),
    re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin"),
    re.compile(r"open_clip_pytorch_model\.bin"),
)


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id, OWNER/NAME, perhaps with open_clip's "hf-hub:"."""
    return bool(_ID.fullmatch(name.removeprefix("hf-hub:")))


def download(name: str, revision: str | None = None) -> epath.Path:
    """The folder in the Hub's cache that holds the model `name`, fetched if it must be.

    Offline (`HF_HUB_OFFLINE=1`, or no network) the cache alone is used.

    Raises:
        CheckpointError: there is no such model, no access to it, or no network and no copy.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    name = name.removeprefix("hf-hub:")
    try:
        files = huggingface_hub.HfApi().list_repo_files(name, revision=revision)
        return epath.Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=needed(files))
        )
    except errors.GatedRepoError:
        raise CheckpointError(
            f"the model {name!r} asks for your consent: accept its terms at "
            f"https://huggingface.co/{name} and log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no folder and no Hub model {name!r}: check the name, or log in with "
            "`hf auth login` if it is private"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"the Hub model {name!r} has no revision {revision!r}") from None
    except Exception as error:  # the network fails in any way; the cache may still do
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    try:
        return epath.Path(
            huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
        )
    except Exception:
        cache = constants.HF_HUB_CACHE
        folder = os.path.join(cache, "models--" + name.replace("/", "--"))
        raise CheckpointError(
            f"the model {name!r} is not on this disk, and the Hub cannot be reached ({reason}): "
            f"its config.json and model.safetensors would be put under {folder}; connect and try "
            "again, or give the path of a folder that holds them"
        ) from None


def needed(files: list[str]) -> list[str]:
    """Of a repository's files, those that loading reads: small ones, and one format of weights."""
    chosen = [name for name in files if _SMALL.fullmatch(name)]
    for pattern in _WEIGHTS:
        weights = [name for name in files if pattern.fullmatch(name)]
        if weights:
            return chosen + weights
    return chosen
