"""Memory, step time and cost of an experiment on a slice of chips that you do not have.

`plan` compiles the training step for the slice with the TPU compiler, without a TPU, and reads
memory, communication and FLOPs from the compiled program. For NVIDIA GPUs, whose compiler needs
the card, the figures are analytic estimates. Each figure is labelled with its basis.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.planning.prediction import Plan as Plan
    from vlm.planning.prediction import plan as plan
    from vlm.planning.report import BASES as BASES
    from vlm.planning.sweeps import sweep as sweep
