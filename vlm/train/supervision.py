"""What a run is taught beside its pairs: the classes of their texts, and a teacher's embeddings."""

from jax.sharding import Mesh

from vlm.config import Experiment
from vlm.data.random_access import Batch
from vlm.data.reinforced import Reinforced
from vlm.inputs.tokenizer import Tokenizer
from vlm.inputs.two_tokenizers import AnyTokenizer, TwoTokenizers
from vlm.train.classes import Classes
from vlm.train.run import Run
from vlm.train.step import Trainer, TrainState
from vlm.train.teacher import StoredTeacher, Teacher


class TrainingSupervision:
    """The classes and the teacher of a run, where it has them.

    Raises:
        DataError, CheckpointError, ConfigError: see `Classes` and `Teacher`.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh, tokenizer: Tokenizer):
        e = experiment
        self.classes = None if e.objective == "contrastive" else Classes(e.data, tokenizer)
        self.teacher: Teacher | StoredTeacher | None = None
        self.tokenizer: AnyTokenizer = tokenizer  # of the batches
        self.reinforced: Reinforced | None = None
        if e.distill is not None and e.distill.stored:
            self.teacher = StoredTeacher(e)
            self.reinforced = self.teacher.embeddings
        elif e.distill is not None:
            self.teacher = Teacher(e, mesh)
            self.tokenizer = TwoTokenizers(tokenizer, self.teacher.tokenizer)

    @property
    def class_count(self) -> int:
        return 0 if self.classes is None else len(self.classes)

    def leave(self, run: Run, trainer: Trainer, state: TrainState) -> None:
        """Write what a run leaves beside its bundle: the head of a classification."""
        if self.classes is not None and run.experiment.objective == "classification":
            self.classes.save(run, trainer, state)

    def added(self, batch: Batch) -> Batch:
        """A batch as it was made, with all that its step needs."""
        if isinstance(self.tokenizer, TwoTokenizers):
            batch = self.tokenizer.split(batch)
        return batch if self.classes is None else self.classes.added(batch)
