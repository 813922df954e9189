"""Load a saved classifier of any kind; the file has the kind."""

import os

from vlm.errors import CheckpointError
from vlm.heads import few_shot, prompted, zero_shot
from vlm.heads.classifier_file import kind_of_classifier
from vlm.heads.encoder import Encoder

KINDS = {
    zero_shot.KEY: zero_shot.ZeroShotClassifier,
    few_shot.KEY: few_shot.FewShotClassifier,
    prompted.KEY: prompted.PromptedClassifier,
}
Classifier = zero_shot.ZeroShotClassifier | few_shot.FewShotClassifier | prompted.PromptedClassifier


def load_classifier(file: str | os.PathLike, model: Encoder) -> Classifier:
    """Load a classifier of any kind that its `save` wrote.

    Args:
        file: the saved classifier.
        model: the model that it was made with.

    Raises:
        CheckpointError: no such file, another file, or a classifier of another model.

    Example:
        >>> vlm.ZeroShotClassifier(model, ["cat", "dog"]).save(folder / "pets.safetensors")
        >>> vlm.heads.load_classifier(folder / "pets.safetensors", model).labels
        ('cat', 'dog')
    """
    kind = kind_of_classifier(file)
    if kind not in KINDS:
        raise CheckpointError(f"{file} is a {kind}, which this vlm does not support: update it")
    return KINDS[kind].load(file, model)
