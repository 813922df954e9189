"""Resumable download of a large file into the Hub's cache.

huggingface_hub resumes a download after network errors, but deletes what has arrived when the
process ends. Here the part is kept beside the cached files, and a later process continues it.
"""

import hashlib
import os
from pathlib import Path
from urllib.parse import urlparse

from vlm.errors import CheckpointError
from vlm.weights.pins import hub_folder


def download_blob(name: str, file: str, commit: str) -> None:
    """Download the content of a file of a Hub model, from where an earlier process stopped.

    Afterwards `hf_hub_download` finds it in its cache. Nothing is done if it is there already.

    Raises:
        CheckpointError: the digest of the file is wrong.
        Exception: errors of the disk, of huggingface_hub, and of its HTTP client.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, utils
    from huggingface_hub.file_download import http_get

    url = hub.hf_hub_url(name, file, revision=commit)
    about = hub.get_hf_file_metadata(url)
    if about.etag is None or about.size is None:
        return  # a server that does not describe its files: the client's own download is used
    folder = Path(constants.HF_HUB_CACHE, hub_folder(name), "blobs")
    blob, part = folder / about.etag, folder / f"{about.etag}.part"
    headers = utils.build_hf_headers()
    if urlparse(about.location).netloc != urlparse(url).netloc:
        headers.pop("authorization", None)  # the token is for the Hub alone
    folder.mkdir(parents=True, exist_ok=True)
    with utils.WeakFileLock(f"{part}.lock"):
        if blob.exists() and os.path.getsize(blob) == about.size:
            return
        with part.open("ab") as out:
            start = out.tell()
            if start > about.size:
                start = out.truncate(0)
            http_get(
                about.location,
                out,
                resume_size=start,
                headers=headers,
                expected_size=about.size,
                displayed_filename=file,
            )
        if start and len(about.etag) == 64 and _sha256(part) != about.etag:
            part.unlink()
            raise CheckpointError(
                f"{file} of the Hub model {name!r} arrived damaged and was deleted: try again"
            )
        part.replace(blob)
    Path(f"{part}.lock").unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    """Return the digest by which the Hub names large files."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
