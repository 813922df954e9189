"""Methods of adaptation to labelled images: each is a function here, and a line in METHODS.

A method takes `MethodInputs` and returns a classifier with the model that computes its embeddings.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from vlm.adaptation import fine_tuning, learned_prompt, template_search
from vlm.adaptation.blending import blend
from vlm.adaptation.cost import time_per_image
from vlm.adaptation.labelled import Labelled
from vlm.bundle import Bundle
from vlm.config import AdapterConfig
from vlm.errors import ConfigError
from vlm.heads.few_shot import FewShotClassifier, LinearHead, fit_head
from vlm.heads.prompts import class_embeddings, class_prompts, label_prompts
from vlm.heads.saved import Classifier
from vlm.heads.zero_shot import ZeroShotClassifier, encode_images

N_CTX = 4  # context vectors for a template without words before the label
PASSES = 4  # forward passes that a training step costs: forward, backward and update
MIN_STEPS = 8  # minimum training steps of a trial
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # weights of the fine-tuned model in a blend


@dataclass(frozen=True)
class MethodResult:
    """Result of a method.

    Attributes:
        model: the model whose embeddings the classifier takes.
        classifier: over the classes of the training images.
        trained: number of trained parameters.
        note: choices of the method, in a few words.
    """

    model: Bundle
    classifier: Classifier
    trained: int
    note: str = ""


@dataclass
class MethodInputs:
    """Model, data and time limit of a method.

    Attributes:
        model: the bundle to adapt.
        train, validation: labelled images.
        z_train, z_validation: their embeddings by the model.
        templates: sentences around the class names.
        folder: for training runs.
        seconds_per_image: of both towers, for an image and a sentence.
        seconds: time limit of this method.
        seed: of all randomness.
        teacher: a model to distil.
        earlier: results of earlier methods, by name.
    """

    model: Bundle
    train: Labelled
    validation: Labelled
    z_train: Float[np.ndarray, "n d"]
    z_validation: Float[np.ndarray, "v d"]
    templates: tuple[str, ...]
    folder: Path
    seconds_per_image: float
    seconds: float = math.inf
    seed: int = 0
    teacher: Bundle | None = None
    earlier: dict[str, MethodResult] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return self.train.names

    @property
    def prompts(self) -> dict[str, tuple[str, ...]]:
        """Sentences of each class."""
        return label_prompts(self.train.names, self.train.texts, self.templates)

    def zero_shot(self, model: Bundle, trained: int, note: str = "") -> MethodResult:
        """Make the result of a model with its zero-shot classifier."""
        return MethodResult(model, ZeroShotClassifier(model, self.prompts), trained, note)

    def head(self, method: Literal["anchored", "cache"]) -> MethodResult:
        """Make the result of a few-shot head on the embeddings of the model."""
        scale = self.model.logit_scale
        prior = scale * class_embeddings(self.model, self.prompts).T
        head = fit_head(
            self.z_train, self.train.target, method, None, prior, scale, len(self.names)
        )
        count = head.weight.size if isinstance(head, LinearHead) else 0
        return MethodResult(self.model, FewShotClassifier(self.model, self.names, head), count)


class OverBudget(Exception):
    """A method would take longer than its time limit; `needed` is in seconds."""

    def __init__(self, needed: float):
        super().__init__(f"it takes about {needed:,.0f} s")
        self.needed = needed


def zero_shot(s: MethodInputs) -> MethodResult:
    """Classify by the class names in the templates, without training."""
    return s.zero_shot(s.model, 0)


def probe(s: MethodInputs) -> MethodResult:
    """Fit a linear probe that starts at the zero-shot weights and is regularised towards them."""
    return s.head("anchored")


def tip(s: MethodInputs) -> MethodResult:
    """Add votes of the labelled images to the zero-shot logits (Tip-Adapter)."""
    return s.head("cache")


def prompt(s: MethodInputs) -> MethodResult:
    """Search the best template for these images, and learn a context from it (CoOp)."""
    searched = template_search.search_by_embeddings(
        s.model,
        s.z_train,
        s.train.target,
        s.train.texts,
        _fitting(s),
        s.templates,
        s.seed,
        s.train.groups,
    )
    best = searched.templates[0]
    start = time.monotonic()
    class_embeddings(s.model, s.train.texts, [best])
    step = PASSES * (time.monotonic() - start)
    steps = int(min(learned_prompt.STEPS, s.seconds / step))
    if steps < MIN_STEPS:
        raise OverBudget(MIN_STEPS * step)
    has_words = bool(best.partition("{}")[0].strip())
    learned = learned_prompt.learn_prompt(
        s.model, s.z_train, [s.names[i] for i in s.train.target], s.names, best,
        n_ctx=None if has_words else N_CTX, steps=steps, seed=s.seed, texts=s.train.texts,
    )  # fmt: skip
    trained = learned_prompt.trained_parameters(learned)
    return MethodResult(s.model, learned, trained, f"from {best!r}, {steps} steps")


def _fitting(s: MethodInputs) -> list[str]:
    """Return the templates of the pool whose sentences fit the context of the text tower."""
    cut = s.model.tokenizer.count_truncated
    prompts = {t: class_prompts(s.train.texts, [t]).values() for t in template_search.POOL}
    return [t for t, own in prompts.items() if not cut([sentence for (sentence,) in own])]


def lora(s: MethodInputs) -> MethodResult:
    """Train low-rank adapters in the vision tower and merge them."""
    return _fine_tuned(s, "lora", AdapterConfig(targets=("vision.*",)))


def full(s: MethodInputs) -> MethodResult:
    """Train all parameters of the vision tower."""
    return _fine_tuned(s, "full")


def distill(s: MethodInputs) -> MethodResult:
    """Train as `full` does, and match a teacher's similarities of images and sentences in a batch.

    As similarities are compared, the teacher's embeddings may have another width.
    """
    if s.teacher is None:
        raise ConfigError(NO_TEACHER)
    return _fine_tuned(s, "distill", teacher=s.teacher)


def blended(s: MethodInputs) -> MethodResult:
    """Average the fine-tuned model with the original (WiSE-FT).

    Of the alphas that are not clearly worse than the best on the validation images, by one standard
    error of the difference, choose the smallest: it forgets the least.
    """
    tuned = {name: s.earlier[name] for name in TUNED if name in s.earlier}
    if not tuned:
        raise ConfigError("there is no fine-tuned model to blend: give a larger budget")
    needed = len(tuned) * len(ALPHAS) * len(s.validation) * s.seconds_per_image
    if needed > s.seconds:
        raise OverBudget(needed)
    correct: dict[tuple[float, str], np.ndarray] = {}  # validation images, by alpha and run
    for name, outcome in tuned.items():
        for alpha in ALPHAS:
            candidate = s.zero_shot(blend(s.model, outcome.model, alpha), 0)
            z, _ = encode_images(candidate.model, s.validation.images)
            logits = candidate.classifier.logits(z)
            correct[alpha, name] = np.asarray(logits).argmax(1) == s.validation.target
    best = max(correct.values(), key=lambda right: right.sum()).astype(np.float64)
    lost = {at: best - right for at, right in correct.items()}
    as_good = (at for at, d in lost.items() if d.mean() <= d.std() / math.sqrt(len(d)))
    alpha, name = min(as_good, key=lambda at: (at[0], lost[at].mean()))
    model = blend(s.model, tuned[name].model, alpha)
    return s.zero_shot(model, tuned[name].trained, f"{alpha:.0%} of {name}")


def _fine_tuned(
    s: MethodInputs,
    name: str,
    adapter: AdapterConfig | None = None,
    teacher: Bundle | None = None,
) -> MethodResult:
    per_image, seconds = s.seconds_per_image * PASSES, s.seconds
    if teacher is not None:
        of_teacher, compiling = time_per_image(teacher, s.train, s.templates[0])
        per_image, seconds = per_image + of_teacher, seconds - compiling
    length = fine_tuning.run_length(len(s.train), per_image, seconds)
    if length.steps < MIN_STEPS:
        raise OverBudget(length.start + MIN_STEPS * length.step)
    model, trained = fine_tuning.fine_tune(
        s.model, s.train, s.templates, s.folder, name, length, adapter, teacher, s.seed
    )
    return s.zero_shot(model, trained, f"{length.steps} steps of {length.batch_size}")


@dataclass(frozen=True)
class Method:
    """A method, and whether its result is another model."""

    run: Callable[[MethodInputs], MethodResult]
    changes_model: bool = False


# In the order of trials: the cheapest first, and the blend after the fine-tuned models.
METHODS: dict[str, Method] = {
    "probe": Method(probe),
    "tip": Method(tip),
    "prompt": Method(prompt),
    "lora": Method(lora, changes_model=True),
    "full": Method(full, changes_model=True),
    "distill": Method(distill, changes_model=True),
    "blend": Method(blended, changes_model=True),
}
TUNED = ("lora", "full", "distill")  # methods whose models can be blended
NO_TEACHER = "method 'distill' needs a teacher model: give one (--teacher MODEL)"
