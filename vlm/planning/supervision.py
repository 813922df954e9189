"""Extra supervision of a planned run: its number of classes and its teacher."""

import functools
from dataclasses import dataclass

from vlm.config import Experiment
from vlm.data.sources import classes_of
from vlm.models.flops import Supervision
from vlm.training.teacher import DescribedTeacher, StoredTeacher, supervision_of


@dataclass(frozen=True)
class PlannedSupervision:
    """Number of classes in the data, and the teacher without its weights."""

    classes: int = 0
    teacher: DescribedTeacher | StoredTeacher | None = None

    @property
    def embedding(self) -> DescribedTeacher | None:
        """The teacher if it embeds batches online, else None."""
        return self.teacher if isinstance(self.teacher, DescribedTeacher) else None

    @property
    def supervision(self) -> Supervision:
        return supervision_of(self.classes, self.teacher)


@functools.lru_cache(maxsize=8)
def planned_supervision(experiment: Experiment) -> PlannedSupervision:
    """Read the extra supervision of an experiment; cached, since sweeps ask often.

    Raises:
        DataError: the classes cannot be counted, or stored embeddings do not exist.
        CheckpointError, ConfigError: the teacher does not exist or is not usable.
    """
    e = experiment
    classes = len(classes_of(e.data).labels) if e.objective == "classification" else 0
    if e.distill is None:
        return PlannedSupervision(classes)
    return PlannedSupervision(classes, (StoredTeacher if e.distill.stored else DescribedTeacher)(e))
