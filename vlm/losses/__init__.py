"""Contrastive losses, exact over the global batch for any number of devices and micro-batches.

`softmax.py` and `sigmoid.py` have the mathematics, `ring.py` the all-pairs reduction over devices,
`contrastive.py` the differentiable function, and `cached.py` exact gradient accumulation.
"""

from vlm.losses.cached import cached_value_and_grad
from vlm.losses.contrastive import contrastive_loss
from vlm.losses.relational import relational_loss
from vlm.losses.sigmoid import sigmoid_loss
from vlm.losses.softmax import softmax_loss

__all__ = [
    "cached_value_and_grad",
    "contrastive_loss",
    "relational_loss",
    "sigmoid_loss",
    "softmax_loss",
]
