"""What a slice of chips will do with an experiment, before it is rented.

`plan` compiles the real training step for the slice, with the TPU compiler and without a TPU, and
reads memory, communication and operations off the result. For NVIDIA GPUs, whose compiler
wants the card, the same figures are counted by hand. Every figure says which it is.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.plan.planning import BASES as BASES
    from vlm.plan.planning import Plan as Plan
    from vlm.plan.planning import plan as plan
    from vlm.plan.sweeps import sweep as sweep
