"""The ways to adapt a model to labelled images: each is a function here, and a line in METHODS.

A method is given a setting and gives back a classifier, with the model whose embeddings it takes.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vlm.adaptation import fine_tuning, learned_prompt, template_search
from vlm.adaptation.blending import blend
from vlm.adaptation.cost import pace_of
from vlm.adaptation.labelled import Labelled
from vlm.bundle import Bundle
from vlm.config import AdapterConfig
from vlm.errors import ConfigError
from vlm.heads.few_shot import CacheHead, FewShotClassifier, LinearHead, fit_head
from vlm.heads.prompts import class_embeddings, class_prompts, label_prompts
from vlm.heads.saved import Classifier
from vlm.heads.zero_shot import ZeroShotClassifier, encode_images

N_CTX = 4  # vectors where the template has no words to begin from
PASSES = 4  # forward passes that a step of training is worth, both ways and the update
FEWEST = 8  # steps of training below which a try says nothing
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the fine-tuned model in a blend


@dataclass(frozen=True)
class Adapted:
    """What a method gives.

    Attributes:
        model: the model whose embeddings the classifier takes.
        classifier: over the classes of the setting.
        trained: how many parameters were trained.
        note: what was chosen on the way, in a few words.
    """

    model: Bundle
    classifier: Classifier
    trained: int
    note: str = ""


@dataclass
class Setting:
    """What there is to adapt to.

    Attributes:
        model: as `vlm.load` gives it.
        train: the images to learn from, and their embeddings by the model.
        validation: the images to choose by.
        templates: sentences around the classes' names.
        folder: for runs of training.
        pace: seconds that both towers take for an image and a sentence.
        seconds: what a try may take.
        seed: of all that is random.
        teacher: a model to learn from beside the labels.
        found: what the methods before gave, by name.
    """

    model: Bundle
    train: Labelled
    validation: Labelled
    z_train: Float[np.ndarray, "n d"]
    z_validation: Float[np.ndarray, "v d"]
    templates: tuple[str, ...]
    folder: Path
    pace: float
    seconds: float = math.inf
    seed: int = 0
    teacher: Bundle | None = None
    found: dict[str, Adapted] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return self.train.names

    @property
    def prompts(self) -> dict[str, tuple[str, ...]]:
        """The sentences of each class."""
        return label_prompts(self.train.names, self.train.texts, self.templates)


class NoTime(Exception):
    """A try would take longer than it may; says how long, in seconds."""

    def __init__(self, needed: float):
        super().__init__(f"it takes about {needed:,.0f} s")
        self.needed = needed


def zero_shot(s: Setting) -> Adapted:
    """The names of the classes in the templates, and no training."""
    return Adapted(s.model, ZeroShotClassifier(s.model, s.prompts), 0)


def probe(s: Setting) -> Adapted:
    """A linear probe that starts at the zero-shot weights and is held to them."""
    head = _head(s, "anchored")
    assert isinstance(head, LinearHead)
    return Adapted(s.model, FewShotClassifier(s.model, s.names, head), head.weight.size)


def tip(s: Setting) -> Adapted:
    """Tip-Adapter: the votes of the labelled images beside the zero-shot logits."""
    head = _head(s, "cache")
    assert isinstance(head, CacheHead)
    return Adapted(s.model, FewShotClassifier(s.model, s.names, head), 0)


def prompt(s: Setting) -> Adapted:
    """The best templates for these images, or a context learned from them on top (CoOp)."""
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
    if steps < FEWEST:
        raise NoTime(FEWEST * step)
    has_words = bool(best.partition("{}")[0].strip())
    learned = learned_prompt.learn_prompt(
        s.model, s.z_train, [s.names[i] for i in s.train.target], s.names, best,
        n_ctx=None if has_words else N_CTX, steps=steps, seed=s.seed, texts=s.train.texts,
    )  # fmt: skip
    trained = learned_prompt.trained_parameters(learned)
    return Adapted(s.model, learned, trained, f"from {best!r}, {steps} steps")


def _fitting(s: Setting) -> list[str]:
    """The templates of the pool whose sentences the text tower takes whole."""
    cut = s.model.tokenizer.count_truncated
    prompts = {t: class_prompts(s.train.texts, [t]).values() for t in template_search.POOL}
    return [t for t, own in prompts.items() if not cut([sentence for (sentence,) in own])]


def lora(s: Setting) -> Adapted:
    """Low-rank adapters in the vision tower, trained and merged."""
    return _fine_tuned(s, "lora", AdapterConfig(targets=("vision.*",)))


def full(s: Setting) -> Adapted:
    """All parameters of the vision tower trained."""
    return _fine_tuned(s, "full", None)


def distill(s: Setting) -> Adapted:
    """As `full`, and learning how a teacher finds the images and sentences of a batch alike.

    Similarities are compared, so the teacher's embeddings may have another width.
    """
    if s.teacher is None:
        raise ConfigError(NO_TEACHER)
    return _fine_tuned(s, "distill", None, s.teacher)


def blended(s: Setting) -> Adapted:
    """The fine-tuned model averaged with the one that it began from (WiSE-FT).

    Of the shares that are not clearly worse than the best on the validation part, by one standard
    error of the difference, the smallest: it keeps the most of what the model knew.
    """
    tuned = {name: s.found[name] for name in TUNED if name in s.found}
    if not tuned:
        raise ConfigError("there is no fine-tuned model to blend: give a larger budget")
    needed = len(tuned) * len(SHARES) * len(s.validation) * s.pace
    if needed > s.seconds:
        raise NoTime(needed)
    tried: dict[tuple[float, str], np.ndarray] = {}  # by share and run, which images are right
    for name, one in tuned.items():
        for share in SHARES:
            model = blend(s.model, one.model, share)
            classifier = ZeroShotClassifier(model, s.prompts)
            z, _ = encode_images(model, s.validation.images)
            tried[share, name] = classifier.logits(z).argmax(1) == s.validation.target
    best = max(tried.values(), key=lambda right: right.sum()).astype(np.float64)
    lost = {at: best - right for at, right in tried.items()}
    as_good = (at for at, d in lost.items() if d.mean() <= d.std() / math.sqrt(len(d)))
    share, name = min(as_good, key=lambda at: (at[0], lost[at].mean()))
    model = blend(s.model, tuned[name].model, share)
    classifier = ZeroShotClassifier(model, s.prompts)
    return Adapted(model, classifier, tuned[name].trained, f"{share:.0%} of {name}")


@dataclass(frozen=True)
class Method:
    """A way to adapt: what does it, and whether it leaves another model."""

    run: Callable[[Setting], Adapted]
    changes_model: bool = False


# In the order in which they are tried: the cheapest first, and a blend after what it blends.
METHODS: dict[str, Method] = {
    "probe": Method(probe),
    "tip": Method(tip),
    "prompt": Method(prompt),
    "lora": Method(lora, changes_model=True),
    "full": Method(full, changes_model=True),
    "distill": Method(distill, changes_model=True),
    "blend": Method(blended, changes_model=True),
}
TUNED = ("lora", "full", "distill")  # what a blend is of
NO_TEACHER = "method 'distill' learns from another model: name one as the teacher (--teacher MODEL)"


def _head(s: Setting, method: Any) -> LinearHead | CacheHead:
    scale = s.model.logit_scale
    prior = scale * class_embeddings(s.model, s.prompts).T
    return fit_head(s.z_train, s.train.target, method, None, prior, scale, len(s.names))


def _fine_tuned(
    s: Setting, name: str, adapter: AdapterConfig | None, teacher: Bundle | None = None
) -> Adapted:
    pace, seconds = s.pace * PASSES, s.seconds
    if teacher is not None:
        of_teacher, compiling = pace_of(teacher, s.train, s.templates[0])
        pace, seconds = pace + of_teacher, seconds - compiling
    plan = fine_tuning.plan(s.model, s.train, pace, seconds)
    if plan.steps < FEWEST:
        raise NoTime(plan.start + FEWEST * plan.step)
    model, trained = fine_tuning.fine_tune(
        s.model, s.train, s.templates, s.folder, name, plan, adapter, teacher, s.seed
    )
    classifier = ZeroShotClassifier(model, s.prompts)
    return Adapted(model, classifier, trained, f"{plan.steps} steps of {plan.batch_size}")
