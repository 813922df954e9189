"""Upload of a bundle to the Hugging Face Hub, with a model card.

All files are one commit: a failed upload changes no file of the repository.
"""

import contextlib
import logging
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NoReturn

import jax
from etils import epath

from vlm.errors import CheckpointError, ConfigError, check_choice, first_line
from vlm.paths import as_path
from vlm.weights import hub, pins
from vlm.weights.bundle_format import BUNDLE_FILE, check_quantize
from vlm.weights.card_facts import CARD_FILE
from vlm.weights.eight_bits import EightBits
from vlm.weights.model_card import (
    LIBRARIES,
    SupportsJson,
    base_model_id,
    licence_fields,
    origin_of,
    updated_card,
    write_card,
)
from vlm.weights.writing import SavedFormat

_log = logging.getLogger(__name__)
# The file by which a repository's format is known.
_FORMATS: dict[str, SavedFormat] = {
    BUNDLE_FILE: "vlm",
    "open_clip_config.json": "open_clip",
    "config.json": "huggingface",
}
# Weights that a loader might prefer to those that are uploaded.
_WEIGHTS = re.compile(
    r"(open_clip_|pytorch_)*(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, to a token with write access"


def push_to_hub(
    self: Any,  # a Bundle, which imports this module
    repo: str,
    *,
    format: SavedFormat = "vlm",
    licence: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    results: epath.PathLike | SupportsJson | None = None,
    description: str = "",
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    dry_run: epath.PathLike | None = None,
    quantize: EightBits | None = None,
) -> str:
    """Upload the model to the Hugging Face Hub with a model card, as one commit.

    An adapter is merged. The card has the licence, training data, evaluation and config, as far as
    the run folder records them that the model was loaded from. A card that was edited on the Hub
    keeps its text; only its YAML is updated.

    Args:
        repo: OWNER/NAME on the Hub; created if there is none.
        format: of the files: "vlm", "huggingface" or "open_clip". `vlm.load` reads all three.
        licence: Hub name of the licence, such as "apache-2.0". None: that of the base model's card.
        base_model: Hub id of the model that this one was trained from. None: that of the run.
        datasets: Hub names of training data, in addition to `hf://` sources of the run.
        results: a `Report`, or the path of a results.json. None: that of the run.
        description: first paragraph of the card.
        private: visibility of a new repository. None: the account's default.
        revision: branch to push to; created if there is none. None: main.
        commit_message: first line of the commit. None: "Upload with vlm".
        token: None: `HF_TOKEN`, or that of `hf auth login`.
        dry_run: write all files to this new folder, and upload nothing.
        quantize: eight bits for large parameters, "int8" or "float8", as in `Bundle.save`.

    Returns:
        The address of the commit, or the folder of a dry run.

    Raises:
        CheckpointError: the licence is unknown, the format does not support the model, the
            repository has another format, there is no token, access or network.
        ConfigError: an invalid name of a repository or a format, or `quantize` for another format.

    Example:
        >>> model.push_to_hub("me/shapes", licence="apache-2.0", dry_run=folder / "upload")
        >>> sorted(path.name for path in (folder / "upload").iterdir())
        ['README.md', 'bundle.json', 'model.safetensors', 'tokenizer.json']
    """
    check_choice("format", format, LIBRARIES)
    check_quantize(quantize, format)
    for name in (repo, *filter(None, [base_model]), *datasets):
        _check_name(name)
    if jax.process_count() > 1:
        raise ConfigError(
            "a run of several processes cannot push: save the model, and push it from one process"
        )
    origin = origin_of(self, lambda: self.identity, results)
    fields, licence_from = licence_fields(licence, base_model or origin.base)
    card = write_card(
        self,
        repo,
        format,
        origin,
        licence=fields,
        licence_from=licence_from,
        base_model=base_model or base_model_id(origin.base),
        datasets=datasets,
        description=description,
    )
    if dry_run is not None:
        folder = as_path(dry_run)
        if folder.exists():
            raise CheckpointError(f"{dry_run} exists already: give the path of a new folder")
        self.save(folder, format, quantize=quantize)
        (folder / CARD_FILE).write_text(card)
        return str(dry_run)
    with _one_sentence(repo, token):
        files, branch = _check_target(repo, format, private, revision, token)
        if CARD_FILE in files:
            card = _merged(repo, branch, token, card)
    with tempfile.TemporaryDirectory(prefix="vlm-push-") as made:
        folder = epath.Path(made) / "model"
        self.save(folder, format, quantize=quantize)
        (folder / CARD_FILE).write_text(card)
        with _one_sentence(repo, token):
            address = _upload(
                repo, folder, files, private, revision, branch != revision,
                commit_message or "Upload with vlm", token,
            )  # fmt: skip
    if revision is None:
        pins.forget_pin(repo)  # so that the next load is of what was pushed
    return address


def _check_name(name: str) -> None:
    """Raise a ConfigError unless a name has the form OWNER/NAME, as the Hub allows it."""
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        valid = hub.is_hub_id(name)
    except errors.HFValidationError:
        valid = False
    if not valid:
        raise ConfigError(f"{name!r} is not a name on the Hub: give OWNER/NAME")


def _check_target(
    repo: str, form: SavedFormat, private: bool | None, revision: str | None, token: str | None
) -> tuple[Collection[str], str | None]:
    """Check that a repository can take the model.

    Returns:
        Its files; and its branch to compare with, or None if there is no repository yet.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{repo} cannot be pushed, as HF_HUB_OFFLINE is set: unset it")
    if token is None and huggingface_hub.get_token() is None:
        raise CheckpointError(f"there is no token to push {repo} with: {_LOG_IN}")
    api, branch = huggingface_hub.HfApi(token=token), revision or "main"
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    try:
        try:
            about = api.model_info(repo, revision=branch, timeout=timeout)
        except errors.RevisionNotFoundError:  # a new branch, which starts as main
            about, branch = api.model_info(repo, timeout=timeout), "main"
    except errors.RepositoryNotFoundError as error:
        if isinstance(error, errors.GatedRepoError):
            raise
        return (), None
    files = {sibling.rfilename for sibling in about.siblings or ()}
    there = {form for file, form in _FORMATS.items() if file in files}
    if there and form not in there:
        held = " and ".join(sorted(there))
        raise CheckpointError(
            f"{repo} has a model in the format {held}, and not {form!r}: push to another "
            f"repository, or with format={sorted(there)[0]!r}"
        )
    if private is not None and bool(about.private) != private:
        is_now = "private" if about.private else "public"
        raise CheckpointError(
            f"{repo} exists and is {is_now}: change its visibility in its settings on the Hub, or "
            "leave out private"
        )
    return files, branch


def _merged(repo: str, branch: str | None, token: str | None, card: str) -> str:
    """Return the card with the text of the one on the Hub, if that was edited there."""
    import huggingface_hub

    old = huggingface_hub.hf_hub_download(repo, CARD_FILE, revision=branch, token=token)
    merged = updated_card(epath.Path(old).read_bytes(), card, f"{CARD_FILE} of {repo}")
    if merged != card:
        _log.warning(
            "%s of %s was edited by hand: its text stays, and its YAML is updated", CARD_FILE, repo
        )
    return merged


def _upload(
    repo: str,
    folder: epath.Path,
    files: Collection[str],
    private: bool | None,
    revision: str | None,
    new_branch: bool,
    message: str,
    token: str | None,
) -> str:
    """Create what is missing, and commit the folder; return the address of the commit."""
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    if not files:
        api.create_repo(repo, private=private, exist_ok=True)
    if revision is not None and new_branch:
        api.create_branch(repo, branch=revision, exist_ok=True)
    new = {path.name for path in folder.iterdir()}
    stale = [file for file in files if _WEIGHTS.fullmatch(file) and file not in new]
    done = api.upload_folder(
        repo_id=repo,
        folder_path=str(folder),
        commit_message=message,
        revision=revision,
        delete_patterns=stale or None,
    )
    return str(done.commit_url)


@contextlib.contextmanager
def _one_sentence(repo: str, token: str | None) -> Iterator[None]:
    """Context manager that re-raises errors of the client as a CheckpointError with a fix."""
    try:
        yield
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # the client has many types
        _explain(error, repo, token)


def _explain(error: Exception, repo: str, token: str | None) -> NoReturn:
    from huggingface_hub import constants, errors

    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of one of several files
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    reason = first_line(error)
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        message = f"the Hub does not accept the token for {repo} (401): {_LOG_IN}"
    elif status in (401, 403, 404):
        message = (
            f"the Hub does not let this token write to {repo} ({status}): {_owners(repo, token)}"
        )
    elif isinstance(error, ValueError) and status is None:
        why = " ".join(str(error).split())[:300]
        message = f"the Hub refuses the model card of {repo} ({why}): correct its values"
    elif status is not None:
        message = (
            f"the Hub answers with an error for {repo} ({reason}): no file of it was changed, try "
            "again later"
        )
    else:
        message = (
            f"{repo} did not reach the Hub at {constants.ENDPOINT} ({reason}): no file of it was "
            "changed; connect and try again"
        )
    raise CheckpointError(message) from None


def _owners(repo: str, token: str | None) -> str:
    """Return a hint on the namespaces that the token may write to, as far as the Hub tells."""
    import huggingface_hub

    owner = repo.partition("/")[0]
    try:
        about = huggingface_hub.HfApi(token=token).whoami()
        names = [str(about["name"]), *(str(org["name"]) for org in about.get("orgs") or ())]
    except Exception:  # only a hint
        return _LOG_IN
    if owner not in names:
        return f"it is for the namespaces {', '.join(names)}, so push to one of them"
    return _LOG_IN
