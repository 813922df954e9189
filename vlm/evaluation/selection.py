"""Image-caption selection: which caption is of which image, among a few that differ in one thing.

Winoground (Thrush et al., 2022, arXiv:2204.03162) has two images and two captions in an instance,
SugarCrepe (Hsieh et al., 2023, arXiv:2306.14610) one image, its caption and a wrong one.
"""

import numpy as np
from jaxtyping import Bool, Float

from vlm.errors import DataError
from vlm.evaluation.intervals import Metric, proportion


def selection_hits(
    z_image: Float[np.ndarray, "n i d"], z_text: Float[np.ndarray, "n c d"]
) -> dict[str, Bool[np.ndarray, " n"]]:
    """Of each instance, whether every choice is right; image j belongs to caption j.

    `text_acc`: each image's own caption is nearer to it than the others. `image_acc`: each
    caption's own image is nearer to it than the others. `acc`: both. A tie is a miss (in
    CLIP_benchmark it goes to the one that comes first).

    Raises:
        DataError: other shapes, or embeddings that are not finite.
    """
    z_image, z_text = np.asarray(z_image, np.float32), np.asarray(z_text, np.float32)
    if z_image.ndim != 3 or z_text.ndim != 3 or len(z_image) != len(z_text) or not z_image.size:
        raise DataError(
            f"images of shape {z_image.shape} and captions of {z_text.shape}: give the same "
            "number of instances, (n, images, d) and (n, captions, d)"
        )
    if not (np.isfinite(z_image).all() and np.isfinite(z_text).all()):
        raise DataError("embeddings hold values that are not finite: look at the model's weights")
    scores = np.einsum("nid,ncd->nic", z_image, z_text)
    count = min(scores.shape[1:])
    own = np.einsum("njj->nj", scores[:, :count, :count])
    # How many are at least as near: one, itself, where the choice is right.
    texts = (scores[:, :count] >= own[:, :, None]).sum(axis=2)
    images = (scores[:, :, :count] >= own[:, None]).sum(axis=1)
    text, image = (texts == 1).all(axis=1), (images == 1).all(axis=1)
    return {"image_acc": image, "text_acc": text, "acc": image & text}


def selection_metrics(
    z_image: Float[np.ndarray, "n i d"], z_text: Float[np.ndarray, "n c d"]
) -> dict[str, Metric]:
    """The shares of instances that `selection_hits` finds right, as CLIP_benchmark names them."""
    hits = selection_hits(z_image, z_text)
    return {name: proportion(int(right.sum()), len(right)) for name, right in hits.items()}
