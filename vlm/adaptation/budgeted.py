"""Adaptation within a time budget: try methods, choose by validation accuracy, measure.

The choice depends on the validation images alone; test and out-of-distribution data are only
measured.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich import box
from rich.markup import escape as markup
from rich.table import Table

from vlm._deprecation import warn
from vlm._json import to_json
from vlm.adaptation import results
from vlm.adaptation.class_report import ClassReport
from vlm.adaptation.cost import OverBudget, ResourceMeter, TimeBudget, time_per_image
from vlm.adaptation.labelled import Labelled, hold_out, with_names
from vlm.adaptation.methods import (
    METHODS,
    NO_TEACHER,
    TUNED,
    Method,
    MethodInputs,
    MethodResult,
    zero_shot,
)
from vlm.adaptation.results import ZERO_SHOT, Row
from vlm.bundle import Bundle
from vlm.data.class_names import described
from vlm.data.duplicates import copied_from
from vlm.errors import ConfigError, VlmError
from vlm.evaluation.classification import target_ranks
from vlm.evaluation.intervals import hit_rate
from vlm.heads.prompts import label_prompts
from vlm.heads.saved import Classifier
from vlm.heads.templates import choose_templates, describe_templates
from vlm.heads.zero_shot import FILE, ZeroShotClassifier, encode_images, to_scores

_log = logging.getLogger(__name__)
SPARE = 0.9  # of the remaining budget, for which a trial is planned


@dataclass(frozen=True, eq=False)
class Adaptation:
    """Result of `adapt`.

    Attributes:
        rows: zero-shot, then each method.
        chosen: the method with the best validation accuracy; ties go to the higher likelihood.
        model, classifier: of that method.
        about: description of model, data and options.
        report: predictions of the chosen method on the test images, else on the validation images.

    Example:
        >>> from PIL import ImageOps
        >>> names, data = ("red", "green", "blue"), vlm.DataInfo("colours")
        >>> dark = [ImageOps.posterize(picture, 1) for picture in pictures]
        >>> labelled = vlm.adaptation.Labelled(pictures + dark, np.arange(6) % 3, names, data)
        >>> result = vlm.adaptation.adapt(model, labelled, folder, budget=600, methods=["probe"])
        >>> print(result["probe"].validation)
        100.0% [29.2%, 100.0%] of 3
    """

    rows: tuple[Row, ...]
    chosen: str
    model: Bundle
    classifier: Classifier
    about: dict[str, str]
    report: ClassReport | None = None

    def __getitem__(self, method: str) -> Row:
        """Return the row of a method."""
        return {row.method: row for row in self.rows}[method]

    def save(self, folder: Path) -> None:
        """Write model, classifier, table and page to a folder that `vlm.load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save(folder / "bundle")
        self.classifier.save(folder / FILE)
        contents = {
            "chosen": self.chosen,
            **self.about,
            "methods": [asdict(row) for row in self.rows],
        }
        (folder / "results.json").write_text(to_json(contents, indent=2) + "\n")
        results.write_page(folder / "report.html", self.rows, self.chosen, self.about, self.report)

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
    progress: Callable[[str], None] = lambda message: None,
    teacher: Bundle | None = None,
    say: Callable[[str], None] | None = None,
) -> Adaptation:
    """Try methods on labelled images within a time budget, and choose one.

    Args:
        model: the bundle to adapt.
        data: labelled images; a part of each class becomes the validation split.
        folder: for training runs.
        budget: seconds for all trials; measuring on `test` and `shifted` is extra.
        methods: names from METHODS; by default all that fit the budget, "distill" only with a
            teacher.
        templates: sentences around the class names; by default the model's, else those of the data
            set, else "a photo of a {}.".
        test: labelled images to measure on, of the same classes.
        shifted: labelled out-of-distribution images. With other classes they measure forgetting,
            by zero-shot accuracy.
        seed: of all randomness.
        progress: called with a message for each stage.
        teacher: a larger model for "distill".
        say: old name of `progress`.

    Raises:
        ConfigError: an unknown method, "distill" without a teacher or a teacher without "distill",
            a class that `data` does not have, a budget too small for any method.
        VlmError: the error of a method, if no other method succeeds.
        DataError: no images to hold out.

    Example:
        >>> from PIL import ImageOps
        >>> names, data = ("red", "green", "blue"), vlm.DataInfo("colours")
        >>> dark = [ImageOps.posterize(picture, 1) for picture in pictures]
        >>> labelled = vlm.adaptation.Labelled(pictures + dark, np.arange(6) % 3, names, data)
        >>> result = vlm.adaptation.adapt(model, labelled, folder, budget=600, methods=["probe"])
        >>> [row.method for row in result.rows]
        ['zero-shot', 'probe']
    """
    if say is not None:
        warn("adapt(say=...)", "adapt(progress=...)", stacklevel=3)
        progress = say
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        known = ", ".join(METHODS)
        raise ConfigError(f"there is no method {unknown[0]!r} to adapt with: choose from {known}")
    if teacher is None and "distill" in methods:
        raise ConfigError(NO_TEACHER)
    if teacher is not None and methods and "distill" not in methods:
        raise ConfigError(
            f"a teacher is given, but no method of {', '.join(methods)} uses one: add the method "
            "'distill', or omit the teacher"
        )
    deadline = time.monotonic() + budget
    train, validation = hold_out(data, seed=seed)
    copies = _copies(data, test, shifted)
    templates_in_use = choose_templates(templates, model, data)
    test = None if test is None else with_names(test, data.names, data.texts)
    own_classes = shifted is not None and not set(shifted.names) <= set(data.names)
    if shifted is not None and not own_classes:
        shifted = with_names(shifted, data.names, data.texts)
    per_image = time_per_image(model, train, templates_in_use[0])
    try:
        TimeBudget(deadline).plan(per_image * len(data))  # to embed all images
    except OverBudget as error:
        raise ConfigError(_too_small(budget, error)) from None
    progress(f"{len(train):,} training images, {len(validation):,} validation images")
    z_train, _ = encode_images(model, train.images)
    z_validation, _ = encode_images(model, validation.images)
    inputs = MethodInputs(
        model, train, validation, z_train, z_validation, templates_in_use, folder, per_image,
        TimeBudget(deadline), seed, teacher,
    )  # fmt: skip
    shifted_templates = choose_templates(templates, model, shifted) if own_classes else None
    evaluator = Evaluator(inputs, test, shifted, shifted_templates)
    outcomes, rows = {}, []

    def attempt(name: str, method: Method, time_budget: TimeBudget) -> Row:
        with ResourceMeter() as meter:
            outcome = method.run(replace(inputs, budget=time_budget))
        outcomes[name] = inputs.earlier[name] = outcome
        rows.append(evaluator.row(name, outcome, meter))
        return rows[-1]

    attempt(ZERO_SHOT, Method(zero_shot), TimeBudget())
    wanted = [name for name in METHODS if teacher is not None or name != "distill"]
    wanted = [name for name in wanted if not methods or name in methods]
    if "blend" in wanted and not set(TUNED) & set(wanted):
        wanted.insert(-1, "full")  # a model to blend
    closest, rejected = None, None
    for number, name in enumerate(wanted):
        now = time.monotonic()
        tuning = [n for n in wanted[number:] if METHODS[n].changes_model]
        parts = max(1, len(tuning)) if METHODS[name].changes_model else 2
        share_end = now + SPARE * (deadline - now) / parts
        report = partial(_report, progress, name)
        try:
            if now >= deadline:
                raise OverBudget("no time was left", 0.0, deadline - now)
            row = attempt(name, METHODS[name], TimeBudget(deadline, share_end, report))
            progress(f"{name}: {row.validation} in {row.seconds:.1f} s")
        except OverBudget as error:
            if closest is None or error.missing < closest.missing:
                closest = error
            rows.append(Row(name, note=str(error)))
            progress(f"{name}: left out, {error}")
        except VlmError as error:  # other methods may work
            rejected = error
            rows.append(Row(name, note=str(error)))
            progress(f"{name}: left out, {error}")
    if len(outcomes) == 1:
        if closest is None and rejected is not None:
            raise rejected
        raise ConfigError(_too_small(budget, closest))
    chosen = max(outcomes, key=evaluator.merit.__getitem__)
    about = {
        "model": model.name,
        "teacher": "" if teacher is None else teacher.name,
        "data": str(data.data),
        "classes": f"{len(data.names):,}",
        "class names": described(data.names, data.texts),
        "templates": describe_templates(templates_in_use),
        "training": f"{len(train):,} images",
        "validation": f"{len(validation):,} images",
        "budget": f"{budget:,.0f} s",
        "seed": str(seed),
        "test": "" if test is None else str(test.data),
        "out of distribution": "" if shifted is None else str(shifted.data),
        **copies,
    }
    best = outcomes[chosen]
    if best.model is not model:
        best.model.templates = templates_in_use  # blends included
    about = {name: value for name, value in about.items() if value}
    report = evaluator.report(chosen)
    return Adaptation(tuple(rows), chosen, best.model, best.classifier, about, report)


class Evaluator:
    """Measures results of methods; methods that keep the model share its embeddings."""

    def __init__(
        self,
        inputs: MethodInputs,
        test: Labelled | None,
        shifted: Labelled | None,
        shifted_templates: Sequence[str] | None,
    ):
        self._base = inputs.model
        sets = {"validation": inputs.validation, "test": test, "shifted": shifted}
        self._sets = {name: labelled for name, labelled in sets.items() if labelled is not None}
        self._shifted_templates = shifted_templates  # if its classes differ
        self._cache = {"validation": inputs.z_validation}
        self.merit: dict[str, tuple[float, float]] = {}  # validation accuracy and likelihood
        # Of `_shown`, by method: the class of each image, and its score.
        self._predictions: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._shown = "validation" if test is None else "test"

    def row(self, name: str, outcome: MethodResult, meter: ResourceMeter) -> Row:
        logits = {which: self._logits(which, outcome) for which in self._sets}
        measured = {
            which: hit_rate(target_ranks(values, self._sets[which].target), 1)
            for which, values in logits.items()
        }
        scores = to_scores(logits[self._shown], "softmax")
        self._predictions[name] = scores.argmax(1), scores.max(1)
        likelihood = self._log_likelihood(logits["validation"])
        self.merit[name] = measured["validation"].value, likelihood
        return Row(name, outcome.trained, meter.seconds, meter.peak, note=outcome.note, **measured)

    def report(self, method: str) -> ClassReport:
        """Return the predictions of a method on the test images, else on the validation images."""
        labelled, (predicted, confidence) = self._sets[self._shown], self._predictions[method]
        return ClassReport(
            self._shown, labelled.names, labelled.target, predicted, confidence, labelled.images
        )

    def _log_likelihood(self, logits: np.ndarray) -> float:
        """Compute the mean log probability of the validation labels."""
        own = np.take_along_axis(
            to_scores(logits, "softmax"), self._sets["validation"].target[:, None], axis=1
        )
        return float(np.log(np.maximum(own, 1e-12)).mean())

    def _logits(self, which: str, outcome: MethodResult) -> np.ndarray:
        labelled, classifier = self._sets[which], outcome.classifier
        if which == "shifted" and self._shifted_templates:
            prompts = label_prompts(labelled.names, labelled.texts, self._shifted_templates)
            classifier = ZeroShotClassifier(outcome.model, prompts)
        return np.asarray(classifier.logits(self._embeddings(which, outcome.model)))

    def _embeddings(self, which: str, model: Bundle) -> np.ndarray:
        if model is not self._base:
            return encode_images(model, self._sets[which].images)[0]
        if which not in self._cache:
            self._cache[which] = encode_images(model, self._sets[which].images)[0]
        return self._cache[which]


def _copies(data: Labelled, test: Labelled | None, shifted: Labelled | None) -> dict[str, str]:
    """Count copies of images, for the page; log a warning if they inflate an accuracy."""
    facts = {}
    sizes = np.bincount(data.groups)
    if (copies := int((sizes - 1).sum())) > 0:
        labels = np.unique(np.stack([data.groups, data.target]), axis=1)[0]
        several = int((np.bincount(labels) > 1).sum())
        facts["copies"] = f"{copies:,} of {len(data):,} images, kept on one side of the split" + (
            f"; {several:,} images are in several classes" if several else ""
        )
    for name, other in (("test", test), ("out of distribution", shifted)):
        if other is None:
            continue
        count = int(copied_from(other.thumbnails, data.thumbnails).sum())
        if count:
            copied = f"{count:,} of {len(other):,} images ({count / len(other):.1%})"
            facts[f"{name}: copies of training or validation images"] = copied
            _log.warning(
                "%s of the %s data are copies of training or validation images, so its accuracy is "
                "too high: remove them", copied, name,
            )  # fmt: skip
    return facts


def _report(progress: Callable[[str], None], method: str, plan: str) -> None:
    progress(f"{method}: {plan}")


def _too_small(budget: float, error: OverBudget | None) -> str:
    sentence = f"a budget of {budget:.4g} s is too small for any method"
    if error is None:
        return f"{sentence}: give more"
    enough = math.ceil(1.2 * (budget + error.missing))  # a second run varies
    return f"{sentence} ({error}): give at least {enough:,} s"
