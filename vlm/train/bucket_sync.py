"""Files that grow while a run goes, in a bucket: written to the disk and copied over now and then.

An object in a bucket cannot be appended to. What a log or TensorBoard writes would be seen only
once the file is closed, and be lost if the run is killed.
"""

import os
import tempfile
import threading
from pathlib import Path

from etils import epath

from vlm.paths import as_config_error, is_remote
from vlm.train.console import print_on_first_process

PERIOD = 10.0  # seconds between two copies of what has changed


class BucketSync:
    """`local`, a folder on the disk whose files appear in `folder`; `folder` itself if on disk."""

    def __init__(self, folder: epath.Path):
        self.folder, self.local = folder, folder
        self._sizes: dict[str, int] = {}  # of the files, as they were copied last
        self._copying = threading.Lock()
        self._over = threading.Event()
        self._held = self._failed = None

    def __enter__(self) -> "BucketSync":
        if is_remote(self.folder):
            self._held = tempfile.TemporaryDirectory(prefix="vlm-run-")
            self.local = epath.Path(self._held.name)
            self._thread = threading.Thread(target=self._keep_copying, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        if self._held is None:
            return
        self._over.set()
        self._thread.join()
        try:
            self.copy()
        except Exception:
            if error[0] is None:  # never hide the error that is already on its way
                raise
        finally:
            self._held.cleanup()

    def copy(self) -> None:
        """Copy what has changed, and return once it is there.

        Raises:
            ConfigError: the bucket refused; the message says why.
        """
        if self._held is None:
            return
        failed = as_config_error(
            f"the log could not be copied to {self.folder}", "resume the run when it answers"
        )
        with self._copying, failed:
            for path in sorted(Path(self._held.name).rglob("*")):
                name = os.path.relpath(path, self._held.name)
                if path.is_file() and self._sizes.get(name) != (size := path.stat().st_size):
                    (self.folder / name).write_bytes(path.read_bytes()[:size])
                    self._sizes[name] = size

    def _keep_copying(self) -> None:
        while not self._over.wait(PERIOD):
            try:
                self.copy()
                self._failed = None
            except Exception as error:  # the next copy has all that this one lacks
                if self._failed is None:
                    self._failed = str(error)
                    print_on_first_process(f"{self._failed}; it is tried again")
