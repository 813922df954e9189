"""What LoRA takes beside full fine-tuning, CLIP ViT-L/14, by the compiled steps of both.

    python tests/planning/adapter_memory.py v5e:1x1 32
    python tests/planning/adapter_memory.py cpu:1 8

Prints the bytes of the optimizer's state and the peak of a chip, the time of a step where the
chip's rates are published, and the ratios. Nothing runs.
"""

import sys

from vlm.config import AdapterConfig, Experiment, MeshConfig, OptimizerConfig
from vlm.models import recipes
from vlm.planning import plan

FORMS = {
    "full": None,
    "LoRA, rank 8": AdapterConfig(rank=8),
    "LoRA, rank 8, int8": AdapterConfig(rank=8, quantize="int8"),
}


def main() -> None:
    topology, batch = sys.argv[1], int(sys.argv[2])
    first = None
    for name, adapter in FORMS.items():
        e = Experiment(
            **recipes.clip("L/14"),
            optimizer=OptimizerConfig(),
            mesh=MeshConfig(),
            batch_size=batch,
            adapter=adapter,
        )
        found = plan(e, topology, loss=False)
        first = first or found
        memory, whole = found.memory, first.memory
        line = (
            f"{name:20} parameters {memory.parameters / 2**20:8,.1f} MiB  optimizer "
            f"{memory.optimizer / 2**20:8,.1f} MiB ({memory.optimizer / whole.optimizer:.2%})  "
            f"peak {memory.peak / 2**30:6.2f} GiB ({memory.peak / whole.peak:.1%})"
        )
        if found.step_seconds and first.step_seconds:
            seconds = found.step_seconds
            line += f"  step {1e3 * seconds.low:,.0f} to {1e3 * seconds.high:,.0f} ms "
            line += f"({seconds.middle / first.step_seconds.middle:.1%})"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
