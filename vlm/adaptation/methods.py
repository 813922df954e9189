"""Methods of adaptation to labelled images: each is a function here, and a line in METHODS.

A method takes `MethodInputs` and returns a classifier with the model that computes its embeddings.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from vlm.adaptation import fine_tuning, learned_prompt, template_search
from vlm.adaptation.blending import blend
from vlm.adaptation.cost import Estimate, TimeBudget, measured
from vlm.adaptation.labelled import Labelled
from vlm.bundle import Bundle
from vlm.config import AdapterConfig
from vlm.errors import ConfigError
from vlm.heads.few_shot import FewShotClassifier, LinearHead, fit_head
from vlm.heads.prompts import class_embeddings, class_prompts, label_prompts
from vlm.heads.saved import Classifier
from vlm.heads.zero_shot import ZeroShotClassifier, encode_images

N_CTX = 4  # context vectors for a template without words before the label
LEAST_STEPS = 8  # of a learned prompt
# A probe is fitted with this many products of the embeddings with its weights and their gradients,
# between 3,000 and 8,000 images, 37 and 200 classes.
PRODUCTS = 30, 80
ROWS = 2048  # images that are timed for a head
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
        per_image: time of both towers, for an image and a sentence.
        budget: time for this method.
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
    per_image: Estimate = field(default_factory=lambda: Estimate(0.0, 0.0))
    budget: TimeBudget = field(default_factory=TimeBudget)
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
        self.budget.plan(self._head_estimate(method, prior))
        head = fit_head(
            self.z_train, self.train.target, method, None, prior, scale, len(self.names)
        )
        count = head.weight.size if isinstance(head, LinearHead) else 0
        return MethodResult(self.model, FewShotClassifier(self.model, self.names, head), count)

    def _head_estimate(
        self, method: Literal["anchored", "cache"], prior: Float[np.ndarray, "d m"]
    ) -> Estimate:
        """Estimate the time to fit a linear head, or to compare the images with a cache."""
        rows, count = self.z_train[:ROWS], len(self.z_train)
        if method == "cache":
            others = self.z_validation[:ROWS]
            one = measured(lambda: np.exp(others @ rows.T))
            return one * (count * len(self.z_validation) / max(1, len(rows) * len(others)))
        one = measured(lambda: rows.T @ (rows @ prior)) * (count / len(rows))
        few, many = PRODUCTS
        return Estimate(few * one.low, many * one.high, one.warm_up)


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
    pool, texts = _fitting(s), s.train.texts
    one_template = measured(lambda: class_embeddings(s.model, texts, s.templates[:1]))
    s.budget.plan(one_template, count := len({*pool, *s.templates}), count, "templates")
    searched = template_search.search_by_embeddings(
        s.model, s.z_train, s.train.target, texts, pool, s.templates, s.seed, s.train.groups
    )
    best, steps = searched.templates[0], 0

    def plan(step: Callable[[], Any], batch: int) -> int:
        nonlocal steps
        steps = s.budget.plan(
            measured(step), learned_prompt.STEPS, LEAST_STEPS, f"steps of {batch} images"
        )
        return steps

    has_words = bool(best.partition("{}")[0].strip())
    learned = learned_prompt.learn_prompt(
        s.model, s.z_train, [s.names[i] for i in s.train.target], s.names, best,
        n_ctx=None if has_words else N_CTX, steps=plan, seed=s.seed, texts=texts,
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
    s.budget.plan(s.per_image * (len(tuned) * len(ALPHAS) * len(s.validation)))
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
    batch, _ = fine_tuning.batch_and_steps(len(s.train))
    # A step takes at least half of a forward pass: if that does not fit, compile nothing.
    least = s.per_image.low * batch / 2
    replace(s.budget, report=lambda plan: None).plan(
        Estimate(least, least), fine_tuning.LEAST_STEPS, fine_tuning.LEAST_STEPS,
        f"forward passes of {batch} images",
    )  # fmt: skip
    model, trained, length = fine_tuning.fine_tune(
        s.model,
        s.train,
        s.templates,
        s.folder,
        name,
        s.budget,
        s.per_image.high * len(s.validation),
        adapter,
        teacher,
        s.seed,
    )
    return s.zero_shot(model, trained, length)


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
