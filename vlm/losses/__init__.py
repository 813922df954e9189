"""Contrastive losses, exact over the global batch for any number of devices and micro-batches.

`softmax.py` and `sigmoid.py` have the mathematics, `ring.py` the all-pairs reduction over devices,
`contrastive.py` the differentiable function, and `cached.py` exact gradient accumulation.

For custom losses: `LossInputs` is what they get, and `all_pairs` reduces any value of a pair
over the global batch, around the same ring.
"""

from vlm.losses.all_pairs import all_pairs
from vlm.losses.cached import cached_value_and_grad
from vlm.losses.contrastive import contrastive_loss
from vlm.losses.inputs import LossInputs
from vlm.losses.relational import relational_loss
from vlm.losses.sigmoid import sigmoid_loss
from vlm.losses.softmax import softmax_loss

__all__ = [
    "LossInputs",
    "all_pairs",
    "cached_value_and_grad",
    "contrastive_loss",
    "relational_loss",
    "sigmoid_loss",
    "softmax_loss",
]
