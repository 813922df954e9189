"""Defaults of `vlm train --init-from MODEL` that follow from the data, and messages of them.

Class folders are classes, a validation split exists or is held out, and the batch is not larger
than the data. Each choice is logged with the option that changes it.
"""

import dataclasses
import math
import shlex
from collections.abc import Collection
from typing import Any

from vlm.config import DataConfig, Experiment
from vlm.data.class_names import described
from vlm.data.folder import has_texts
from vlm.data.image_folder import IMAGE, columns_of, metadata_table
from vlm.data.pipeline import count_examples
from vlm.data.sources import classes_of, kind_of, open_source, split_names, streams
from vlm.data.splits import VALIDATION_SHARE, find_split
from vlm.display import listed
from vlm.errors import DataError
from vlm.heads.templates import describe_templates
from vlm.sharding import batch_ways, make_mesh
from vlm.training.changes import LENGTHS
from vlm.training.supervision import with_templates

BATCH = 128  # at most
FEWEST = 8  # examples of a batch, if there are that many
STEPS_PER_EPOCH = 4  # at least
EPOCHS, STEPS = 10, 100  # the longer of the two
LABEL, TEXTS = "label", ("text", "caption")  # columns of a metadata table


def with_texts(data: DataConfig, given: Collection[str]) -> DataConfig:
    """Detect whether a folder has a metadata table, captions or class folders, and name it.

    Args:
        data: with the source.
        given: the options that are given, such as "data.label".

    Raises:
        DataError: the data is missing or ambiguous; the message has the options that decide.
    """
    given = set(given)
    if not data.source or kind_of(data.source) != "folder":
        return data
    open_ended = not given & {"data.label", "data.captions"}
    if table := metadata_table(data.source):
        known = columns_of(table.replace("{split}", _first_split(data)))
        data = dataclasses.replace(data, source=table, image=IMAGE)
        return _with_column(data, known) if open_ended else data
    if not open_ended:
        return data
    names = _class_folders(data)
    if not names:
        return data  # texts, or the error of a folder without both
    if has_texts(data.source):
        raise DataError(
            f"{data.source} has texts beside its images, and {len(names)} class folders "
            f"({', '.join(names[:3])}, ...): add --data.captions caption to train on the texts, "
            "or --data.label label for the classes"
        )
    if len(names) < 2:
        raise DataError(
            f"{data.source} has images in the one folder {names[0]!r}, and classes need at least "
            "two: name the folder that holds the class folders"
        )
    return dataclasses.replace(data, label=LABEL)


def _with_column(data: DataConfig, known: Collection[str]) -> DataConfig:
    """Choose the column of labels or texts of a metadata table."""
    texts = [name for name in TEXTS if name in known]
    if LABEL in known and texts:
        raise DataError(
            f"{data.source} has the columns {LABEL!r} and {texts[0]!r}: add --data.label {LABEL} "
            f"to train on the classes, or --data.captions {texts[0]} on the texts"
        )
    if LABEL in known:
        return dataclasses.replace(data, label=LABEL)
    if texts:
        return dataclasses.replace(data, captions=(texts[0],))
    raise DataError(
        f"{data.source} has the columns {', '.join(known)}: add --data.label COLUMN for classes, "
        "or --data.captions COLUMN for texts"
    )


class DataDefaults:
    """Fills in the fields of an experiment that depend on its data and are not given.

    Args:
        experiment: of `vlm train --init-from MODEL`, with the fields that are given, and data as
            `with_texts` returns it.
        given: the options that name them, such as "data.label".

    Attributes:
        experiment: with the fields filled in.
        choices: (option, reason) of each of them.

    Raises:
        DataError: the data is missing, or its classes have no names.

    Example:
        >>> for name, picture in zip(("red", "green", "blue"), pictures):
        ...     (folder / "pets" / name).mkdir(parents=True)
        ...     for i in range(4):
        ...         picture.save(folder / "pets" / name / f"{i}.png")
        >>> from vlm.training.data_defaults import DataDefaults, with_texts
        >>> given = ["data.source"]
        >>> data = vlm.DataConfig(source=str(folder / "pets"), eval_split=None)
        >>> data = with_texts(data, given)
        >>> start = vlm.Experiment(data=data, init_from=str(bundle), batch_size=128)
        >>> chosen = DataDefaults(start, given)
        >>> chosen.experiment.objective, chosen.experiment.batch_size
        ('flyp', 8)
    """

    def __init__(self, experiment: Experiment, given: Collection[str]):
        self.experiment, self._given = experiment, set(given)
        self.choices: list[tuple[str, str]] = []
        if not experiment.data.source or streams(experiment.data):
            return
        self._note_texts()
        if self.experiment.data.label:
            self._choose_supervision()
            self._choose_evaluation()
        self._choose_length()

    def lines(self) -> list[str]:
        """Return the choices as lines of text; empty if nothing was chosen."""
        if not self.choices:
            return []
        rows = [line for option, why in self.choices for line in (f"  {option}", f"      {why}")]
        return ["defaults that follow from the data (give an option to override it):", *rows]

    def _set(self, why: str, **fields: Any) -> None:
        """Set fields of the experiment, `data_NAME` for those of its data, and note the options."""
        data = {n.removeprefix("data_"): v for n, v in fields.items() if n.startswith("data_")}
        others = {name: value for name, value in fields.items() if not name.startswith("data_")}
        self.experiment = dataclasses.replace(
            self.experiment, data=dataclasses.replace(self.experiment.data, **data), **others
        )
        named = {f"data.{name}": value for name, value in data.items()} | others
        options = " ".join(_option(name, value) for name, value in named.items())
        self.choices.append((options, why))

    def _note_texts(self) -> None:
        """Note what `with_texts` has chosen."""
        data = self.experiment.data
        if data.image == IMAGE and "data.image" not in self._given:
            option = f"--data.source {shlex.quote(data.source)} --data.image {IMAGE}"
            self.choices.append((option, "the table beside the images"))
        if self._given & {"data.label", "data.captions"}:
            return
        if data.label and data.image == IMAGE:
            self.choices.append((_option("data.label", data.label), "the column of this name"))
        elif data.label:
            names = listed(classes_of(_whole(data)).labels, 3).replace(":", " folders:", 1)
            why = f"the class is the folder of an image; {names}"
            self.choices.append((_option("data.label", data.label), why))
        elif data.captions != DataConfig.captions:
            self.choices.append((_option("data.captions", data.captions), "the column of texts"))

    def _choose_supervision(self) -> None:
        e = self.experiment
        if "objective" not in self._given and e.objective == "contrastive":
            self._set(
                "both towers learn sentences of the class names; classification trains a head",
                objective="flyp",
            )
        labels, names = classes_of(_whole(e.data))
        why = described(labels, names)
        templates = with_templates(self.experiment).data.templates
        if "data.templates" not in self._given:
            data = dataclasses.replace(self.experiment.data, templates=templates)
            self.experiment = dataclasses.replace(self.experiment, data=data)
            sentence = templates[0].replace("{}", names[0])
            option = _option("data.templates", templates if len(templates) < 3 else "...")
            about = f"{describe_templates(templates)}; such as {sentence!r}"
            self.choices.append((option, f"{about}; {why}" if why else about))

    def _choose_evaluation(self) -> None:
        e = self.experiment
        if self._given & {"data.eval-split", "data.hold-out"} or e.evals or e.eval_every == 0:
            return
        known = split_names(e.data) or []
        for wanted in ("validation", "test"):
            try:
                split = find_split(wanted, known, e.data.source)
            except DataError:
                continue
            count = count_examples(dataclasses.replace(e.data, eval_split=split), split)
            why = f"{count:,} images, for evaluation only"
            return self._set(why, data_eval_split=split)
        share = VALIDATION_SHARE
        self._set("", data_eval_split="validation", data_hold_out=share)
        data = self.experiment.data
        held, whole = count_examples(data, data.eval_split), count_examples(e.data)
        option, _ = self.choices.pop()
        why = f"{share:.0%} of each class, {held:,} of {whole:,} images, the same in every run"
        self.choices.append((option, why))

    def _choose_length(self) -> None:
        e = self.experiment
        count = count_examples(e.data)
        if "batch-size" not in self._given:
            ways = batch_ways(make_mesh(e.mesh))
            if e.micro_batch_size is not None:
                ways = math.lcm(ways, e.micro_batch_size)
            batch = batch_size_for(count, ways)
            self._set(f"of {count:,} training images", batch_size=batch)
        if not self._given & set(LENGTHS):
            batch = self.experiment.batch_size
            epochs = max(EPOCHS, math.ceil(STEPS * batch / count))
            steps = max(1, int(epochs * count / batch))
            self._set(f"{steps:,} steps", epochs=float(epochs))


def batch_size_for(count: int, ways: int = 1) -> int:
    """Return a batch size for `count` examples: a multiple of `ways`, the shards of a batch.

    It is at most `BATCH`, and an epoch has at least `STEPS_PER_EPOCH` of them, unless they would
    be smaller than `FEWEST`. It is at most `count` wherever `ways` is.
    """
    wanted = min(BATCH, max(count // STEPS_PER_EPOCH, FEWEST), count)
    return max(1, wanted // ways) * ways


def _option(name: str, value: Any) -> str:
    values = value if isinstance(value, tuple) else (value,)
    texts = [f"{v:g}" if isinstance(v, float) else shlex.quote(str(v)) for v in values]
    return f"--{name.replace('_', '-')} {' '.join(texts)}"


def _class_folders(data: DataConfig) -> list[str]:
    """List the classes of a folder; empty if it has no class folders.

    Raises:
        DataError: the folder is missing, or the depth of its class folders varies.
    """
    labelled = dataclasses.replace(_whole(data), label=LABEL, captions=())
    try:
        source = open_source(labelled, data.train_split)
    except DataError as error:
        if "no class folders" in str(error) or "no images" in str(error):
            return []
        raise
    return list(getattr(source, "label_names", None) or ())


def _whole(data: DataConfig) -> DataConfig:
    return dataclasses.replace(data, eval_split=None, hold_out=0.0)


def _first_split(data: DataConfig) -> str:
    known = split_names(data)
    if not known:
        return ""
    return find_split(data.train_split, known, data.source)
