"""Contrastive losses, exact over the global batch however it is cut over devices and micro-batches.

Read `softmax.py` and `sigmoid.py` for the mathematics, `ring.py` for how every image meets every
text, `contrastive.py` for how the two become one differentiable function, and `cached.py` for
batches larger than the towers can hold.
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
