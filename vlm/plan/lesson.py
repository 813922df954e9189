"""What a run is taught beside its pairs, as a plan needs it: a number of classes, and a teacher."""

import functools
from dataclasses import dataclass

from vlm.config import Experiment
from vlm.data.sources import classes_of
from vlm.models.flops import Taught
from vlm.train.teacher import DescribedTeacher, StoredTeacher, taught_by


@dataclass(frozen=True)
class PlannedLesson:
    """The classes of a classification are counted in its data; a teacher's weights are not read."""

    classes: int = 0
    teacher: DescribedTeacher | StoredTeacher | None = None

    @property
    def embedding(self) -> DescribedTeacher | None:
        """The teacher, if it embeds every batch."""
        return self.teacher if isinstance(self.teacher, DescribedTeacher) else None

    @property
    def taught(self) -> Taught:
        return taught_by(self.classes, self.teacher)


@functools.lru_cache(maxsize=8)
def planned_lesson(experiment: Experiment) -> PlannedLesson:
    """What an experiment is taught; read once, for a sweep asks often.

    Raises:
        DataError: data whose classes cannot be counted, or embeddings that are not there.
        CheckpointError, ConfigError: a teacher that is not there, or that cannot be one.
    """
    e = experiment
    classes = len(classes_of(e.data).labels) if e.objective == "classification" else 0
    if e.distill is None:
        return PlannedLesson(classes)
    return PlannedLesson(classes, (StoredTeacher if e.distill.stored else DescribedTeacher)(e))
