"""Index of a server: opened at its start, and again when another process has saved it."""

import asyncio
import gc
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.errors import first_line
from vlm.heads import index_folder
from vlm.heads.retrieval import RetrievalIndex
from vlm.serving.batched import Batched
from vlm.serving.gallery import Gallery
from vlm.serving.server import freeze_objects
from vlm.serving.service import Service

CHECK_SECONDS = 2.0  # between two looks at the file that a save replaces
RETRY_SECONDS = 30.0  # after an index that could not be opened

_log = logging.getLogger(__name__)


class ServedIndex:
    """Folder of an index, and the state of its files when they were last read.

    Args:
        folder: may be a symbolic link, which is followed again at each reload.
        model: encodes queries, and makes thumbnails.
        moved: old and new folders of images, as for `RetrievalIndex.relocate`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: Batched,
        moved: Mapping[str, str] | None = None,
    ):
        self.folder = Path(folder).expanduser().absolute()
        self._model, self._moved = model, dict(moved or {})
        self._state: Any = "unread"

    def open(self, previous: Gallery | None = None) -> Gallery:
        """Open the index; with a previous view, items keep their numbers.

        Raises:
            CheckpointError: no index, a corrupt one, or one of another model.
            ConfigError: no image lies in a folder of `moved` (at the first opening).
        """
        self._state = self._files()
        generation = index_folder.generation(self.folder)
        index = RetrievalIndex.load(self.folder, self._model)
        # After a move the index may be rebuilt with the new paths.
        index.relocate(self._moved, strict=previous is None)
        name = self.folder.resolve().name
        gallery = Gallery(index, name, self._model, generation, previous)
        if len(index):
            index.search(index.embeddings(index.ids[:1])[0], 1)  # reads the rows from the disk
        return gallery

    def changed(self, gallery: Gallery) -> bool:
        """Whether the folder has another generation than a view of it. Usually one `stat`."""
        if self._files() == self._state:
            return False
        self._state = self._files()
        return index_folder.generation(self.folder) != gallery.generation

    async def follow(self, service: Service, seconds: float = CHECK_SECONDS) -> None:
        """Replace the index of a service whenever another process has saved it; never returns.

        An index that cannot be opened is logged, and the service keeps its present one.
        """
        wait, problem = seconds, ""
        while True:
            await asyncio.sleep(wait)
            gallery, wait = service.gallery, seconds
            assert gallery is not None  # opened at the start
            try:
                if not await asyncio.to_thread(self.changed, gallery):
                    continue
                service.gallery = await asyncio.to_thread(self.open, gallery)
            except Exception as error:  # the server goes on with the index that it has
                self._state = "unread"  # try again
                wait = max(seconds, min(RETRY_SECONDS, 10 * seconds))
                service.metrics.reloads.labels("failed").inc()
                if problem != (problem := first_line(error)):
                    _log.warning(
                        "%s changed and cannot be opened (%s): the server keeps the index it has",
                        self.folder, problem,
                    )  # fmt: skip
                continue
            del gallery
            if gc.get_freeze_count():  # by `serve`: the old index would stay in memory
                freeze_objects()
            problem = ""
            service.metrics.reloads.labels("done").inc()
            _log.info(
                "%s was saved by another process: the server now has its %d items",
                self.folder, service.gallery.about.count,
            )  # fmt: skip

    def _files(self) -> Any:
        """Return what a save changes of index.json; None if there is none."""
        try:
            status = os.stat(self.folder / index_folder.DESCRIPTION)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size
