"""Access to data sets on the Hugging Face Hub: `hf://datasets/OWNER/NAME[@REVISION]/FILES`.

Files are read through `huggingface_hub`'s file system, at the endpoint `HF_ENDPOINT` and with the
token `HF_TOKEN` or that of `hf auth login`. Access is checked when a source is opened.
"""

import functools
import re
from typing import Any, NamedTuple, NoReturn

import fsspec

from vlm.errors import DataError, first_line

SCHEME = "hf://"
_FORM = f"{SCHEME}datasets/OWNER/NAME/FILES"
_REPOSITORY = re.compile(
    rf"{SCHEME}((datasets|spaces|models|buckets)/)?+[^/@*]+/[^/@*]+(@refs/\w+/[^/]+|@[^/]+)?(?=/|$)"
)
_FILES = re.compile(
    r"[*{\[]|::|\.(parquet|tar|tgz|arrow|array_record|tfrecord|csv|tsv|jsonl?|ndjson|gz|zip)\b[^/]*$"
)
_NUMBERS = re.compile(r"\d{3,}(-of-\d{3,})?")
_SPLIT = re.compile(r"^(train|training|test|testing|validation|valid|val|dev|eval)(?=[-_./]|$)")
_SHOWN = 3  # patterns in a message


def check_access(path: str) -> None:
    """Check that the Hub has the repository and revision of a path, and lets us read it.

    Nothing is done for a path that is not on the Hub.

    Raises:
        DataError: it has not, it needs a login or consent, or the Hub cannot be reached.
    """
    if not path.startswith(SCHEME):
        return
    if (match := _REPOSITORY.match(path)) is None:
        raise DataError(f"{path} names no data set on the Hub: give {_FORM}")
    _check(match[0])


@functools.lru_cache(256)  # errors are not cached
def _check(repository: str) -> None:
    import huggingface_hub as hub

    system = _system()
    try:
        found = system.resolve_path(repository)
        if hasattr(found, "repo_id"):  # not a bucket of the Hub
            hub.HfApi().auth_check(found.repo_id, repo_type=found.repo_type)
    except Exception as error:  # the client has many types
        system.invalidate_cache()  # a login must help in this process, too
        _explain(repository, error)


class Page(NamedTuple):
    """Web address of a file on the Hub, and the headers of its requests."""

    url: str
    headers: dict[str, str]


def web_address(path: str) -> Page | None:
    """Return the web address of an `hf://` file; None for a file in a bucket of the Hub."""
    import huggingface_hub as hub

    found = _system().resolve_path(path)
    if not hasattr(found, "repo_id"):
        return None
    url = hub.hf_hub_url(
        found.repo_id, found.path_in_repo, repo_type=found.repo_type, revision=found.revision
    )
    return Page(url, hub.utils.build_hf_headers())


class DataSet(NamedTuple):
    """Name of a data set on the Hub, its revision, and what was named inside of it."""

    name: str
    revision: str | None
    inner: str

    @property
    def root(self) -> str:
        """The path of the repository."""
        at = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}datasets/{self.name}{at}"


class Repository(NamedTuple):
    """Files of a data set on the Hub at a commit."""

    named: DataSet
    commit: str
    files: list[str]

    @property
    def root(self) -> str:
        """The path of the repository at the commit."""
        return self.named._replace(revision=self.commit).root


def data_set_of(path: str) -> DataSet | None:
    """Parse the path of a data set or of a folder in it; None for files, patterns and models."""
    match = _REPOSITORY.match(path)
    if match is None or match[2] != "datasets" or _FILES.search(path[match.end() :]):
        return None
    name = match[0].removeprefix(f"{SCHEME}datasets/").partition("@")[0]
    return DataSet(name, (match[3] or "@")[1:] or None, path[match.end() :].strip("/"))


def list_repository(named: DataSet, *, missing: bool = False) -> Repository | None:
    """List the files of a data set; None if there is no such revision and it may be `missing`.

    Raises:
        DataError: the Hub does not have it, or cannot be reached.
    """
    import huggingface_hub as hub

    try:
        info = hub.HfApi().dataset_info(named.name, revision=named.revision)
    except Exception as error:  # the client has many types
        if missing and isinstance(error, hub.errors.RevisionNotFoundError):
            return None
        _explain(named.root, error)
    return Repository(named, info.sha or "main", sorted(f.rfilename for f in info.siblings or ()))


def refuse_files(source: str, repository: Repository) -> NoReturn:
    """Raise a DataError for a data set without files that vlm reads."""
    raise DataError(
        f"{source} has no Parquet files, no tars and no metadata.csv or .jsonl, which vlm reads "
        f"from the Hub: run `hf download --repo-type dataset {repository.named.name} --local-dir "
        "FOLDER`, and give the folder"
    )


def need_files(path: str) -> NoReturn:
    """Raise a DataError for a folder of a model or bucket, with patterns of the files in it."""
    check_access(path)
    root = path.rstrip("/")
    names = [f"{SCHEME}{name}" for name in sorted(_system().find(root))]
    patterns = _patterns(root, names)
    if not patterns:
        raise DataError(
            f"{path} has no Parquet files, no tars and no metadata.csv or .jsonl: name a data set "
            f"of the Hub, as in {_FORM}"
        )
    more = f" and {len(patterns) - _SHOWN} more" if len(patterns) > _SHOWN else ""
    raise DataError(
        f"{path} is a folder on the Hub: name its files in data.source, as in "
        f"{' or '.join(map(repr, patterns[:_SHOWN]))}{more}"
    )


def _patterns(root: str, names: list[str]) -> list[str]:
    """Return patterns for the files that vlm can read: tables, Parquet files and tars."""
    patterns = []
    for name in names:
        inner = name.removeprefix(root).lstrip("/")
        folder, _, last = inner.rpartition("/")
        if not last.endswith((".parquet", ".tar")):
            if last not in ("metadata.csv", "metadata.jsonl"):
                continue
            *above, folder = folder.split("/")
            inner = "/".join(filter(None, [*above, _SPLIT.sub("{split}", folder), last]))
        else:
            last = _SPLIT.sub("{split}", _NUMBERS.sub("*", last))
            inner = f"{folder}/{last}" if folder else last
        patterns.append(f"{root}/{inner}")
    return list(dict.fromkeys(patterns))


def _system() -> Any:
    return fsspec.filesystem("hf")


def _explain(place: str, error: Exception) -> NoReturn:
    """Raise the DataError for a failed check."""
    from huggingface_hub import constants, errors

    cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    login, page = "`hf auth login` or HF_TOKEN", place.removeprefix(SCHEME).partition("@")[0]
    if isinstance(cause, errors.RevisionNotFoundError):
        why = "has no such revision on the Hub: choose a branch, tag or commit after the @"
    elif isinstance(cause, errors.GatedRepoError):
        why = (
            f"asks for your consent: accept its terms at {constants.ENDPOINT}/{page}, and log in "
            f"with {login}"
        )
    elif isinstance(cause, errors.RepositoryNotFoundError) or status == 404:
        why = f"is not on the Hub: check the name, or log in with {login} if it is private"
    elif status in (401, 403):
        why = f"may not be read with this token ({first_line(error)}): log in with {login}"
    elif isinstance(error, ValueError | NotImplementedError | FileNotFoundError):
        why = f"is not a path on the Hub ({first_line(error)}): give {_FORM}"
    elif status is not None:
        why = f"cannot be read ({first_line(error)}): try again later"
    else:
        why = f"cannot be read, as the Hub is out of reach ({first_line(error)}): connect first"
        if constants.HF_HUB_OFFLINE:
            why = "cannot be read, as HF_HUB_OFFLINE is set: unset it"
    raise DataError(f"{place} {why}") from None
