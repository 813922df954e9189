"""What a slice of chips will do with an experiment, before it is rented.

`plan` compiles the real training step for the slice, with the TPU compiler and without a TPU, and
reads memory, communication and operations off the result. For NVIDIA GPUs, whose compiler
wants the card, the same figures are counted by hand. Every figure says which it is.
"""

from vlm.plan.plan import BASES, Plan, plan
from vlm.plan.sweep import sweep

__all__ = ["BASES", "Plan", "plan", "sweep"]
