"""What LoRA takes beside full fine-tuning, CLIP ViT-L/14, from the compiled steps of both.

    python tests/plan/adapter_memory.py v5e:1x1 32
    python tests/plan/adapter_memory.py cpu:1 8

Prints the bytes of the optimizer's state and the peak of a chip, and the ratios. Nothing runs.
"""

import sys

from vlm.config import AdapterConfig, Experiment, MeshConfig, OptimizerConfig
from vlm.models import recipes
from vlm.plan.compile import compile_step, state_bytes, with_dtype
from vlm.plan.planning import plan_mesh
from vlm.plan.topology import parse_topology
from vlm.train.step import Trainer

FORMS = {
    "full": None,
    "LoRA, rank 8": AdapterConfig(rank=8),
    "LoRA, rank 8, int8": AdapterConfig(rank=8, quantize="int8"),
}


def main() -> None:
    topology, batch = parse_topology(sys.argv[1]), int(sys.argv[2])
    first = None
    for name, adapter in FORMS.items():
        e = Experiment(
            **recipes.clip("L/14"),
            optimizer=OptimizerConfig(),
            mesh=MeshConfig(),
            batch_size=batch,
            adapter=adapter,
        )
        e = with_dtype(e, topology.chip.platform if topology.chip else "cpu")
        mesh = plan_mesh(e, topology, compiled=True)
        state = state_bytes(Trainer(e, mesh).abstract_state, mesh)
        step = compile_step(e, mesh)
        first = first or (state, step)
        sys.stdout.write(
            f"{name:20} parameters {state.parameters / 2**20:8,.1f} MiB  optimizer "
            f"{state.optimizer / 2**20:8,.1f} MiB ({state.optimizer / first[0].optimizer:.2%})  "
            f"peak {step.peak / 2**30:6.2f} GiB ({step.peak / first[1].peak:.1%})\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
