"""Extra supervision for a run: class labels and a distillation teacher."""

from jax.sharding import Mesh

from vlm.config import Experiment
from vlm.data.random_access import Batch
from vlm.data.reinforced import Reinforced
from vlm.inputs.tokenizer import AnyTokenizer, Tokenizer, TwoTokenizers
from vlm.training.classes import Classes
from vlm.training.run import Run
from vlm.training.step import Trainer, TrainState
from vlm.training.teacher import StoredTeacher, Teacher


class TrainingSupervision:
    """Classes and teacher of a run; each is None if the experiment does not use it.

    Raises:
        DataError, CheckpointError, ConfigError: see `Classes` and `Teacher`.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh, tokenizer: Tokenizer):
        e = experiment
        self.classes = None if e.objective == "contrastive" else Classes(e.data, tokenizer)
        self.teacher: Teacher | StoredTeacher | None = None
        self.tokenizer: AnyTokenizer = tokenizer  # for the batches
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

    def save_head(self, run: Run, trainer: Trainer, state: TrainState) -> None:
        """Write the classification head beside the bundle, if the run trains one."""
        if self.classes is not None and run.experiment.objective == "classification":
            self.classes.save(run, trainer, state)

    def add_targets(self, batch: Batch) -> Batch:
        """Add the class labels and the teacher's tokens that a step needs to a batch."""
        if isinstance(self.tokenizer, TwoTokenizers):
            batch = self.tokenizer.split(batch)
        return batch if self.classes is None else self.classes.add_targets(batch)
