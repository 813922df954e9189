"""Extra supervision for a run: class labels with their head, and a distillation teacher."""

import dataclasses
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int32

from vlm.bundle import load
from vlm.config import DataConfig, Experiment
from vlm.data.examples import templates_of
from vlm.data.random_access import Batch
from vlm.data.reinforced import Reinforced
from vlm.data.sources import classes_of, open_source, streams
from vlm.errors import ConfigError, DataError
from vlm.heads import zero_shot
from vlm.heads.prompts import label_prompts
from vlm.heads.templates import choose_templates
from vlm.heads.zero_shot import ZeroShotClassifier
from vlm.inputs.tokenizer import AnyTokenizer, Tokenizer, TwoTokenizers
from vlm.training.eval_tasks import Embedder
from vlm.training.run import Run
from vlm.training.step import Trainer, TrainState
from vlm.training.teacher import StoredTeacher, Teacher, teacher_source
from vlm.weights.bundle_format import templates_of as templates_of_model


def with_templates(experiment: Experiment) -> Experiment:
    """Fill in the prompt templates of an experiment with labels, if it sets none.

    They are those of the `init_from` model, else of the data set, else the default. Without
    `init_from` they stay unset: the bare names.

    Raises:
        DataError: the data is missing.
    """
    data = experiment.data
    if not data.label or data.templates or experiment.init_from is None:
        return experiment
    source = None if streams(data) else open_source(data, data.train_split)
    model = dataclasses.replace(data, templates=templates_of_model(experiment.init_from))
    data = dataclasses.replace(data, templates=choose_templates(None, model, source))
    return dataclasses.replace(experiment, data=data)


class Classes:
    """Classes of `data.label`, each with its prompts.

    Raises:
        DataError: the classes of the data are not listed before it is read.
        ConfigError: two classes have the same tokens.
    """

    def __init__(self, data: DataConfig, tokenizer: Tokenizer):
        self._data, self._tokenizer = data, tokenizer
        self.names, names = classes_of(data)
        self.prompts = label_prompts(self.names, names, templates_of(data))
        self.tokens = tokenizer([text for texts in self.prompts.values() for text in texts])
        self._of: dict[bytes, int] = {}
        owners = [i for i, texts in enumerate(self.prompts.values()) for _ in texts]
        for row, number in zip(self.tokens, owners, strict=True):
            other = self._of.setdefault(row.tobytes(), number)
            if other != number:
                raise ConfigError(
                    f"the classes {self.names[other]!r} and {self.names[number]!r} are the same "
                    f"{tokenizer.config.context_length} tokens in the templates "
                    f"{templates_of(data)}: make the templates shorter, or the names differ"
                )

    def __len__(self) -> int:
        return len(self.names)

    def of(self, tokens: Int32[np.ndarray, "b l"]) -> Int32[np.ndarray, " b"]:
        """Return the class of each row of tokens.

        Raises:
            DataError: a text that belongs to no class; the message shows it.
        """
        indices = [self._of.get(row.tobytes(), -1) for row in tokens]
        if -1 in indices:
            text = self._tokenizer.decode(tokens[indices.index(-1)][None])[0]
            raise DataError(
                f"{self._data.source} has the label {text!r}, which is none of the "
                f"{len(self)} classes of the head: list it among the classes of "
                f"data.label {self._data.label!r}, or leave its examples out with data.filters"
            )
        return np.array(indices, np.int32)

    def embed(self, trainer: Trainer, state: TrainState) -> Float[np.ndarray, "m d"]:
        """Compute zero-shot weights: the normalised mean embedding of each class's prompts."""
        return Embedder(trainer).prompts(state, self.tokens, len(self.tokens) // len(self))

    def save(self, run: Run, trainer: Trainer, state: TrainState) -> None:
        """Write the head, or the classes' prompts, beside the bundle for `vlm classify`."""
        by_head = trainer.experiment.objective == "classification"
        kernel = Embedder(trainer).classes(state) if by_head else self.embed(trainer, state)
        if jax.process_index() == 0:
            classifier = ZeroShotClassifier.of_embeddings(load(run.bundle), self.prompts, kernel)
            with tempfile.TemporaryDirectory() as folder:  # a run folder may be in a bucket
                classifier.save(file := Path(folder) / zero_shot.FILE)
                run.classifier.write_bytes(file.read_bytes())


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
        model, stored = teacher_source(e)
        if stored:
            self.teacher = StoredTeacher(e)
            self.reinforced = self.teacher.embeddings
        elif model:
            self.teacher = Teacher(e, mesh)
            self.tokenizer = TwoTokenizers(tokenizer, self.teacher.tokenizer)

    @property
    def class_count(self) -> int:
        return 0 if self.classes is None else len(self.classes)

    def save_head(self, run: Run, trainer: Trainer, state: TrainState) -> None:
        """Write a classifier of the run's classes beside the bundle, if it learns classes."""
        if self.classes is not None:
            self.classes.save(run, trainer, state)

    def add_targets(self, batch: Batch) -> Batch:
        """Add the class labels and the teacher's tokens that a step needs to a batch."""
        if isinstance(self.tokenizer, TwoTokenizers):
            batch = self.tokenizer.split(batch)
        if self.classes is not None:
            batch = batch | {"classes": self.classes.of(batch["tokens"])}
        return batch
