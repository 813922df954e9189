"""Which model made these embeddings: what a saved head remembers of it, and how it is recognised.

A file of embeddings is worth something only beside the model that made them. So a saved head keeps
the model's embeddings of one text and one picture. Equal weights give them again under any name and
in any format; a model that was trained further does not, whatever its name.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import CheckpointError

PROBE_TEXT = "a photo of a red car in the snow"
PROBE_IMAGE = np.add.outer(np.arange(0, 256, 4), np.arange(64)).astype(np.uint8)[..., None] * (
    np.array([1, 2, 3], np.uint8)
)
SAME = 0.999  # the least cosine of a probe with itself across machines and precisions

FIELDS: dict[str, type] = {"model": str, "probe_text": list, "probe_image": list}


def identity(model: Any) -> dict[str, Any]:
    """What is kept of a model beside embeddings that it made, as JSON values."""
    return {
        "model": model.name,
        "fingerprint": getattr(model, "fingerprint", None),
        "probe_text": model.encode_text([PROBE_TEXT])[0].tolist(),
        "probe_image": model.encode_image([PROBE_IMAGE])[0].tolist(),
    }


def check_identity(kept: dict[str, Any], model: Any, where: Path) -> None:
    """Raise a CheckpointError unless `model` embeds as the one that was `kept` did."""
    width = len(kept["probe_text"])
    mend = f"load {kept['model']!r} as it was, or build it again with {model.name!r}"
    z_text = np.asarray(model.encode_text([PROBE_TEXT]), np.float32)[0]
    if len(z_text) != width:
        raise CheckpointError(
            f"{where} holds embeddings of {width} dimensions and the model {model.name!r} makes "
            f"{len(z_text)}: {mend}"
        )
    same = float(z_text @ np.asarray(kept["probe_text"], np.float32)) >= SAME
    fingerprint = getattr(model, "fingerprint", None)
    if same and (fingerprint is None or fingerprint != kept.get("fingerprint")):
        # Two models may share a text tower. Equal files need no such proof, so that a text search
        # does not have to compile the image tower.
        z_image = np.asarray(model.encode_image([PROBE_IMAGE]), np.float32)[0]
        same = float(z_image @ np.asarray(kept["probe_image"], np.float32)) >= SAME
    if not same:
        raise CheckpointError(
            f"{where} was built by the model {kept['model']!r}, and {model.name!r} embeds "
            f"differently: {mend}"
        )
