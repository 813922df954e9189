"""Sync append-only files (logs, TensorBoard) from local disk to a bucket.

An object in a bucket cannot be appended to. A log written there directly would be visible only once
it is closed, and lost if the run is killed.
"""

import os
import tempfile
import threading
from pathlib import Path

from etils import epath

from vlm.paths import as_config_error, is_remote
from vlm.training.console import log

PERIOD = 10.0  # seconds between two copies of the changed files


class BucketSync:
    """Local folder `local` whose files are copied to `folder`; `folder` itself if on disk."""

    def __init__(self, folder: epath.Path):
        self.folder, self.local = folder, folder
        self._sizes: dict[str, int] = {}  # of each file when it was last copied
        self._copying = threading.Lock()
        self._stop = threading.Event()
        self._temporary = self._failed = None

    def __enter__(self) -> "BucketSync":
        if is_remote(self.folder):
            self._temporary = tempfile.TemporaryDirectory(prefix="vlm-run-")
            self.local = epath.Path(self._temporary.name)
            self._thread = threading.Thread(target=self._keep_copying, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        if self._temporary is None:
            return
        self._stop.set()
        self._thread.join()
        try:
            self.copy()
        except Exception:
            if error[0] is None:  # never hide an earlier error
                raise
        finally:
            self._temporary.cleanup()

    def copy(self) -> None:
        """Copy the files that changed, and return once they are in the bucket.

        Raises:
            ConfigError: the bucket refused; the message has the reason.
        """
        if self._temporary is None:
            return
        failed = as_config_error(
            f"the log could not be copied to {self.folder}",
            "resume the run when the bucket responds",
        )
        with self._copying, failed:
            for path in sorted(Path(self._temporary.name).rglob("*")):
                name = os.path.relpath(path, self._temporary.name)
                try:
                    size = path.stat().st_size
                    if not path.is_file() or self._sizes.get(name) == size:
                        continue
                    data = path.read_bytes()[:size]
                except FileNotFoundError:  # a temporary file of a callback
                    continue
                (self.folder / name).write_bytes(data)
                self._sizes[name] = size

    def _keep_copying(self) -> None:
        while not self._stop.wait(PERIOD):
            try:
                self.copy()
                self._failed = None
            except Exception as error:  # the next copy includes these files
                if self._failed is None:
                    self._failed = str(error)
                    log.warning("%s; retrying", self._failed)
