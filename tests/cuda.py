"""Programs for NVIDIA GPUs, lowered on a machine without one.

JAX lowers for platforms that it does not run on. Two questions are about the machine, and a test
answers them for an H100: `vlm.nn.cuda_attention.compute_capability`, and JAX's for the installed
version of cuDNN, which it asks while it traces. Nothing else is replaced, so the program is the one
of a GPU.
"""

import json
import re
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo

from vlm.nn import cuda_attention

CUDNN = 9_10_01  # 9.10.1, for the test of JAX's that some head dimensions need a version


def as_on_a_gpu(monkeypatch) -> None:
    """Trace as on a machine with an H100."""
    monkeypatch.setattr(cuda_attention, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: CUDNN)


def lowered(function: Any, *arguments: Any) -> str:
    """The StableHLO of a function, jitted or not, for CUDA."""
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return jitted.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def attention_calls(program: str) -> list[tuple[str, str]]:
    """(target, mask type) of each call of cuDNN's attention in StableHLO."""
    pattern = r'custom_call @(__cudnn\$fmha\w+)\(.*?backend_config = "((?:[^"\\]|\\.)*)"'
    found = re.findall(pattern, program)
    configs = (json.loads(config.replace("\\22", '"')) for _, config in found)
    return [
        (target, config["cudnn_fmha_backend_config"]["mask_type"])
        for (target, _), config in zip(found, configs, strict=True)
    ]
