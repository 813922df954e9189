"""Config of the frequent checkpoints on the local disk of each host."""

import os
from dataclasses import dataclass

from vlm.config.base import Config
from vlm.errors import ConfigError


@dataclass(frozen=True)
class LocalCheckpointConfig(Config):
    """Emergency checkpoints: each process writes its part of the state to a disk of its host.

    They are quick, and so frequent. A run that lost a process starts from the newest one of which
    its processes still hold every part, if that is newer than the checkpoints of the run folder.

    Args:
        folder: Local folder, the same option on all hosts, such as /dev/shm/vlm or
            "$TMPDIR/vlm": each host fills in its own environment variables. None: no local
            checkpoints.
        every: Number of steps between two local checkpoints.

    Example:
        >>> from vlm.config import LocalCheckpointConfig
        >>> LocalCheckpointConfig("/dev/shm/vlm").every
        50
    """

    folder: str | None = None
    every: int = 50

    @property
    def local_folder(self) -> str | None:
        """The folder on this host.

        Raises:
            ConfigError: it has an environment variable that is not set.
        """
        if self.folder is None:
            return None
        folder = os.path.abspath(os.path.expanduser(os.path.expandvars(self.folder)))
        if "$" in folder:
            raise ConfigError(
                f"local_checkpoints.folder {self.folder!r} has a variable that is not set on this "
                "host: set it, or give another folder"
            )
        return folder

    def check(self):
        if self.folder is None:
            self.refuse_unused("give local_checkpoints.folder", "every")
        elif not self.folder or "://" in self.folder:
            raise ConfigError(
                f"local_checkpoints.folder {self.folder!r} is no local folder: give one on a fast "
                "disk of each host, such as /dev/shm/vlm"
            )
