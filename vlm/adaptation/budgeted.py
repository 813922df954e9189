"""`vlm adapt`: tries methods within a budget, chooses by held-out images, measures, and tells.

What is chosen is chosen by the validation part alone. The test data and the data out of
distribution are measured and never looked at before.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.markup import escape as markup
from rich.table import Table

from vlm._json import to_json
from vlm.adaptation import results
from vlm.adaptation.cost import Cost, pace_of
from vlm.adaptation.labelled import Labelled, hold_out, with_names
from vlm.adaptation.methods import METHODS, NO_TEACHER, TUNED, Adapted, NoTime, Setting, zero_shot
from vlm.adaptation.results import ZERO_SHOT, Row
from vlm.bundle import Bundle
from vlm.data.class_names import described
from vlm.data.duplicates import copied_from
from vlm.errors import ConfigError, VlmError
from vlm.evaluation.intervals import Metric, proportion
from vlm.heads.prompts import label_prompts
from vlm.heads.saved import Classifier
from vlm.heads.templates import choose_templates, describe_templates
from vlm.heads.zero_shot import FILE, ZeroShotClassifier, encode_images, to_scores

_log = logging.getLogger(__name__)
SPARE = 0.9  # of what is left of a budget, that a try may plan with


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What came of it.

    Attributes:
        rows: zero-shot first, and then each method.
        chosen: the method that is best on the validation part; of equally accurate ones the one
            that finds its labels likeliest.
        model, classifier: of that method.
        about: what was adapted to what, in words.

    Example:
        >>> names, data = ("red", "green", "blue"), vlm.DataInfo("colours")
        >>> dark = [picture.point(lambda value: value // 2) for picture in pictures]
        >>> labelled = vlm.adaptation.Labelled(pictures + dark, np.arange(6) % 3, names, data)
        >>> made = vlm.adaptation.adapt(model, labelled, folder, budget=600, methods=["probe"])
        >>> made["probe"].validation.n
        3
    """

    rows: tuple[Row, ...]
    chosen: str
    model: Bundle
    classifier: Classifier
    about: dict[str, str]

    def __getitem__(self, method: str) -> Row:
        """The row of a method."""
        return {row.method: row for row in self.rows}[method]

    def save(self, folder: Path) -> None:
        """Write model, classifier, table and page into a folder that `vlm.load` takes."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save(folder / "bundle")
        self.classifier.save(folder / FILE)
        held = {"chosen": self.chosen, **self.about, "methods": [asdict(row) for row in self.rows]}
        (folder / "results.json").write_text(to_json(held, indent=2) + "\n")
        results.write_page(folder / "report.html", self.rows, self.chosen, self.about)

    def __rich__(self) -> Table:
        """Make the table that `rich.print` shows."""
        table = Table(
            title=f"Top-1 with 95% intervals, templates: {markup(self.about['templates'])}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),  # eight columns in eighty characters
        )
        for name in results.headings(self.rows):
            side = "left" if name in ("method", "note") else "right"
            table.add_column(name, justify=side, min_width=len(name.split()[-1]))
        for row in results.cells(self.rows):
            table.add_row(*row, style="bold" if row[0] == self.chosen else "")
        return table

    def _repr_html_(self) -> str:
        return results.html_table(self.rows, self.chosen)


def adapt(
    model: Bundle,
    data: Labelled,
    folder: Path,
    budget: float,
    methods: Sequence[str] = (),
    templates: Sequence[str] | None = None,
    test: Labelled | None = None,
    shifted: Labelled | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    teacher: Bundle | None = None,
) -> Adaptation:
    """Try methods on labelled images within a budget, and choose one.

    Args:
        model: what `vlm.load` gives.
        data: labelled images; a part of each class is held out to choose by.
        folder: for runs of training.
        budget: seconds for all tries together; measuring on `test` and `shifted` comes on top.
        methods: names out of METHODS; by default all, as far as the budget goes, and "distill"
            if there is a teacher.
        templates: sentences around the names of the classes; by default the model's own, else of
            the data set, else "a photo of a {}.".
        test: labelled images to measure on, of the same classes.
        shifted: labelled images out of distribution. With classes of its own it says what the
            model keeps of what it knew: a method that leaves the model alone keeps it all.
        seed: of everything random.
        say: is told what happens.
        teacher: a larger model, which "distill" learns from.

    Raises:
        ConfigError: an unknown method, "distill" without a teacher or a teacher without "distill",
            a class that `data` has not, a budget too small for a try.
        VlmError: what a method refused, if no other did anything.
        DataError: no images to hold out.

    Example:
        >>> names, data = ("red", "green", "blue"), vlm.DataInfo("colours")
        >>> dark = [picture.point(lambda value: value // 2) for picture in pictures]
        >>> labelled = vlm.adaptation.Labelled(pictures + dark, np.arange(6) % 3, names, data)
        >>> made = vlm.adaptation.adapt(model, labelled, folder, budget=600, methods=["probe"])
        >>> [row.method for row in made.rows]
        ['zero-shot', 'probe']
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        known = ", ".join(METHODS)
        raise ConfigError(f"there is no method {unknown[0]!r} to adapt with: choose from {known}")
    if teacher is None and "distill" in methods:
        raise ConfigError(NO_TEACHER)
    if teacher is not None and methods and "distill" not in methods:
        raise ConfigError(
            f"a teacher is given, and {', '.join(methods)} learn from none: add the method "
            "'distill', or leave the teacher out"
        )
    deadline = time.monotonic() + budget
    train, validation = hold_out(data, seed=seed)
    copies = _copies(data, test, shifted)
    chosen_templates = choose_templates(templates, model, data)
    test = None if test is None else with_names(test, data.names, data.texts)
    own_classes = shifted is not None and not set(shifted.names) <= set(data.names)
    if shifted is not None and not own_classes:
        shifted = with_names(shifted, data.names, data.texts)
    pace = _pace(model, train, chosen_templates[0], len(data), budget)
    say(f"{len(train):,} images to learn from, {len(validation):,} to choose by")
    z_train, _ = encode_images(model, train.images)
    z_validation, _ = encode_images(model, validation.images)
    setting = Setting(
        model, train, validation, z_train, z_validation, chosen_templates, folder, pace,
        seed=seed, teacher=teacher,
    )  # fmt: skip
    of_shifted = choose_templates(templates, model, shifted) if own_classes else None
    judge = Judge(setting, test, shifted, of_shifted)

    made, cost = _costed(zero_shot, setting)
    found, rows = {ZERO_SHOT: made}, [judge.row(ZERO_SHOT, made, cost)]
    able = [name for name in METHODS if teacher is not None or name != "distill"]
    wanted = [name for name in able if not methods or name in methods]
    if "blend" in wanted and not set(TUNED) & set(wanted):
        wanted.insert(-1, "full")  # something to blend
    short, refused = math.inf, None
    for number, name in enumerate(wanted):
        left = deadline - time.monotonic()
        tuning = [n for n in wanted[number:] if METHODS[n].changes_model]
        share = 1 / max(1, len(tuning)) if METHODS[name].changes_model else 1 / 2
        try:
            if left <= 0:
                raise NoTime(0)
            made, cost = _costed(METHODS[name].run, replace(setting, seconds=SPARE * left * share))
        except NoTime as error:
            short = min(short, error.needed)
            rows.append(Row(name, note=f"{error}, and {max(0, left):,.0f} s were left"))
            continue
        except VlmError as error:  # the others may do
            refused = error
            rows.append(Row(name, note=str(error)))
            continue
        found[name] = setting.found[name] = made
        rows.append(judge.row(name, made, cost))
        say(f"{name}: {rows[-1].validation} in {cost.seconds:.1f} s")
    if len(found) == 1 and refused is not None:
        raise refused
    if len(found) == 1:
        raise ConfigError(_too_small(budget, budget + short if math.isfinite(short) else None))
    chosen = max(found, key=judge.merit.__getitem__)
    about = {
        "model": model.name,
        "teacher": "" if teacher is None else teacher.name,
        "data": str(data.data),
        "classes": f"{len(data.names):,}",
        "class names": described(data.names, data.texts),
        "templates": describe_templates(chosen_templates),
        "learned from": f"{len(train):,} images",
        "chosen by": f"{len(validation):,} images",
        "budget": f"{budget:,.0f} s",
        "seed": str(seed),
        "test": "" if test is None else str(test.data),
        "out of distribution": "" if shifted is None else str(shifted.data),
        **copies,
    }
    best = found[chosen]
    if best.model is not model:
        best.model.templates = chosen_templates  # also of a blend
    about = {name: value for name, value in about.items() if value}
    return Adaptation(tuple(rows), chosen, best.model, best.classifier, about)


class Judge:
    """Measures what methods give; images are embedded once for all that leave the model alone."""

    def __init__(
        self,
        setting: Setting,
        test: Labelled | None,
        shifted: Labelled | None,
        own: Sequence[str] | None,
    ):
        self._base = setting.model
        self._sets = {"validation": setting.validation, "test": test, "shifted": shifted}
        self._own = own  # templates of classes out of distribution that are others
        self._kept = {"validation": setting.z_validation}
        self.merit: dict[str, tuple[float, float]] = {}  # by method, on the validation part

    def row(self, name: str, made: Adapted, cost: Cost) -> Row:
        measured = {
            which: self._measure(which, labelled, made)
            for which, labelled in self._sets.items()
            if labelled is not None
        }
        self.merit[name] = measured["validation"].value, self._likelihood(made)
        return Row(name, made.trained, cost.seconds, cost.peak, note=made.note, **measured)

    def _likelihood(self, made: Adapted) -> float:
        """The mean log probability of the labels of the validation part."""
        labelled = self._sets["validation"]
        z = self._embeddings("validation", labelled, made.model)
        scores = to_scores(np.asarray(made.classifier.logits(z)), "softmax")
        own = scores[np.arange(len(labelled)), labelled.target]
        return float(np.log(np.maximum(own, 1e-12)).mean())

    def _measure(self, which: str, labelled: Labelled, made: Adapted) -> Metric:
        z = self._embeddings(which, labelled, made.model)
        classifier: Any = made.classifier
        if which == "shifted" and self._own:
            # The classes are others: the question is what the model itself still knows.
            prompts = label_prompts(labelled.names, labelled.texts, self._own)
            classifier = ZeroShotClassifier(made.model, prompts)
        logits = classifier.logits(z)
        own = logits[np.arange(len(z)), labelled.target]
        right = (logits >= own[:, None]).sum(1) == 1  # as in every evaluation, a tie is a miss
        return proportion(int(right.sum()), len(right))

    def _embeddings(self, which: str, labelled: Labelled, model: Bundle) -> np.ndarray:
        if model is not self._base:
            return encode_images(model, labelled.images)[0]
        if which not in self._kept:
            self._kept[which] = encode_images(model, labelled.images)[0]
        return self._kept[which]


def _copies(data: Labelled, test: Labelled | None, shifted: Labelled | None) -> dict[str, str]:
    """How many images are copies of others, for the page; what inflates a figure is a warning."""
    found = {}
    sizes = np.bincount(data.groups)
    if (copies := int((sizes - 1).sum())) > 0:
        labels = np.unique(np.stack([data.groups, data.target]), axis=1)[0]
        several = int((np.bincount(labels) > 1).sum())
        found["copies"] = f"{copies:,} of {len(data):,} images, kept on one side of the split" + (
            f"; {several:,} images are in several classes" if several else ""
        )
    for name, other in (("test", test), ("out of distribution", shifted)):
        if other is None:
            continue
        count = int(copied_from(other.thumbnails, data.thumbnails).sum())
        if count:
            copied = f"{count:,} of {len(other):,} images ({count / len(other):.1%})"
            found[f"{name}: copies of images learned from"] = copied
            _log.warning(
                "%s of the %s data are copies of images to learn from or to choose by, and its "
                "accuracy is too high: leave them out", copied, name,
            )  # fmt: skip
    return found


def _costed(run: Callable[[Setting], Adapted], setting: Setting) -> tuple[Adapted, Cost]:
    with Cost() as cost:
        made = run(setting)
    return made, cost


def _pace(model: Bundle, labelled: Labelled, template: str, count: int, budget: float) -> float:
    """Seconds for an image and a sentence, measured.

    Raises:
        ConfigError: embedding `count` images would use the budget up.
    """
    pace, compiling = pace_of(model, labelled, template)
    needed = compiling + pace * count
    if needed > budget:
        raise ConfigError(_too_small(budget, 1.5 * needed))
    return pace


def _too_small(budget: float, enough: float | None) -> str:
    mend = "give more" if enough is None else f"give at least {math.ceil(enough):,} s"
    return f"a budget of {budget:.4g} s is too small for one try here: {mend}"
