"""Training throughputs that others published, to judge the plan's predictions by.

Samples per second per chip. None of these ran this project's code; derivations are given where a
source states days or totals. Two rules were fixed before any row was set against a prediction:

- **What is in**: every throughput found whose source names the model, the kind and number of
  chips, and that trains in 16 bits. `software` says what ran: a program that XLA compiled, one of
  hand-fused kernels (NeMo's Megatron), or framework operations one by one ("eager"), which this
  project's step is not and the plan does not predict: such rows are listed and not judged.
- **What is fitted**: of the judged rows, those whose `key` has an even CRC-32. The others are held
  out.

`remat` and a batch in parentheses are our reading where the source is silent: "none" unless the
source says that gradients were checkpointed, or the batch fits no other way.
"""

import zlib
from dataclasses import dataclass
from typing import Literal

from vlm.config import (
    Experiment,
    MeshConfig,
    ModelConfig,
    PreprocessConfig,
    TextConfig,
    TokenizerConfig,
    ViTConfig,
)

SIZES = {  # width, depth, heads, mlp_dim
    "tiny": (64, 1, 1, 64),
    "B-text": (512, 12, 8, 2048),
    "B+text": (640, 12, 10, 2560),
    "L-text": (768, 12, 12, 3072),
    "B": (768, 12, 12, 3072),
    "B+": (896, 12, 14, 3584),
    "L": (1024, 24, 16, 4096),
    "L12": (1024, 12, 16, 4096),
    "H": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
}


@dataclass(frozen=True)
class Published:
    """One throughput. Without `vision` or `text` that tower is too small to matter."""

    source: str
    model: str  # as the source has it
    chip: str
    chips: int
    batch: int  # global
    measured: float  # samples per second per chip
    software: Literal["xla", "fused", "eager"]
    vision: tuple[str, int, int] | None = None  # size, patch, pixels
    text: tuple[str, int] | None = None  # size, tokens
    loss: Literal["softmax", "sigmoid"] = "softmax"
    remat: Literal["none", "full"] = "none"
    mesh: tuple[int, int, int] | None = None  # data, fsdp, tensor; None: all data

    @property
    def key(self) -> str:
        return f"{self.source} | {self.model} | {self.chips} {self.chip} | {self.batch}"

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.key.encode()) % 2 == 1

    @property
    def topology(self) -> str:
        shapes = {"v4": {4: "2x2x1", 16: "2x2x4", 32: "2x4x4"}, "v3": {4: "2x2", 16: "4x4"}}
        return f"{self.chip}:{shapes.get(self.chip, {}).get(self.chips, self.chips)}"

    @property
    def experiment(self) -> Experiment:
        size, patch, pixels = self.vision or ("tiny", 16, 16)
        width, depth, heads, mlp = SIZES[size]
        vision = ViTConfig(
            image_size=pixels,
            patch_size=patch,
            width=width,
            depth=depth,
            heads=heads,
            mlp_dim=mlp,
            pool="mean",
            projection="linear",
        )
        size, tokens = self.text or ("tiny", 1)
        width, depth, heads, mlp = SIZES[size]
        text = TextConfig(context_length=tokens, width=width, depth=depth, heads=heads, mlp_dim=mlp)
        return Experiment(
            name=self.model,
            model=ModelConfig(
                vision=vision,
                text=text,
                embed_dim=max(64, width if self.text else 64),
                loss=self.loss,
                init_bias=-10.0 if self.loss == "sigmoid" else None,
            ),
            preprocess=PreprocessConfig(image_size=pixels),
            tokenizer=TokenizerConfig(context_length=tokens),
            batch_size=self.batch,
            remat=self.remat,
            mesh=MeshConfig(*(self.mesh or (-1, 1, 1))),
            dtype="bfloat16",
        )


SIGLIP = "SigLIP, arXiv:2303.15343, sections 4.4 and 4.5"
VIT = "ViT, arXiv:2010.11929, table 2 (core-days) and appendix B (epochs)"
VERTEX = "Vertex AI, ViT PyTorch vs JAX training benchmarks (vertex-ai-samples), big_vision"
TOOLBOX = "JAX-Toolbox, rosetta/projects/vit/README.md"
NEMO = "NeMo user guide, CLIP performance (2308)"
LAION = "LAION, Large scale openCLIP (2022-09-15), training speeds, gradients checkpointed"
OPEN_CLIP = "open_clip, docs/PRETRAINED.md: 32 epochs of 407M pairs over hours x GPUs"
PLSC = "PaddlePaddle PLSC 2.4, task/classification/vit/README.md, fp16 O2"

ROWS = [
    # 2.4e9 pairs in three days; 9e9 in five (tables 1 and 5, 73.4%); steps x batch in one day
    # ("just under") and two days ("under"), images embedded beforehand.
    Published(
        SIGLIP, "B/16, text 16", "v4", 16, 16384, 2.4e9 / (16 * 3 * 86400), "xla",
        ("B", 16, 224), ("B", 16), "sigmoid", "full",
    ),
    Published(
        SIGLIP, "B/16, text 16", "v4", 32, 32768, 9e9 / (32 * 5 * 86400), "xla",
        ("B", 16, 224), ("B", 16), "sigmoid", "full",
    ),
    Published(
        SIGLIP, "SigLiT, text L of 12 layers", "v4", 4, 32768, 65_000 * 32768 / (4 * 86400),
        "xla", None, ("L12", 16), "sigmoid", "full",
    ),
    Published(
        SIGLIP, "SigLiT, text L", "v4", 4, 20480, 107_000 * 20480 / (4 * 2 * 86400), "xla",
        None, ("L", 16), "sigmoid", "full",
    ),
    # 14 epochs of JFT-300M (303M images); 90 of ImageNet-21k (14.2M): two cores are a chip.
    Published(
        VIT, "H/14, JFT", "v3", 16, 4096, 2 * 14 * 303e6 / (2500 * 86400), "xla", ("H", 14, 224)
    ),
    Published(
        VIT, "L/16, JFT", "v3", 16, 4096, 2 * 14 * 303e6 / (680 * 86400), "xla", ("L", 16, 224)
    ),
    Published(
        VIT, "L/16, ImageNet-21k", "v3", 16, 4096, 2 * 90 * 14.2e6 / (230 * 86400), "xla",
        ("L", 16, 224),
    ),
    Published(VERTEX, "L/16", "v3", 16, 1024, 3020 / 16, "xla", ("L", 16, 224)),
    Published(VERTEX, "H/14", "v3", 16, 512, 61.6, "xla", ("H", 14, 224)),
    Published(VERTEX, "L/16", "a100-40", 8, 512, 2213 / 8, "xla", ("L", 16, 224)),
    Published(VERTEX, "G/14", "a100-40", 8, 128, 36.9, "xla", ("G", 14, 224), mesh=(1, 8, 1)),
    Published(TOOLBOX, "B/16", "a100", 8, 4096, 7200.38 / 8, "xla", ("B", 16, 224)),
    Published(TOOLBOX, "B/16", "h100", 8, 4096, 11669.52 / 8, "xla", ("B", 16, 224)),
    Published(TOOLBOX, "B/16 at 384", "a100", 8, 512, 1841.43 / 8, "xla", ("B", 16, 384)),
    Published(TOOLBOX, "G/14", "a100", 8, 128, 34.63, "xla", ("G", 14, 224)),
    Published(TOOLBOX, "G/14", "a100", 32, 512, 30.36, "xla", ("G", 14, 224)),
    Published(TOOLBOX, "G/14", "a100", 64, 1024, 27.92, "xla", ("G", 14, 224)),
    Published(
        TOOLBOX, "G/14, 8 micro-batches", "a100", 32, 4096, 1281 / 32, "xla", ("G", 14, 224),
    ),
    Published(
        TOOLBOX, "G/14, tensor 4, 8 micro-batches", "a100", 32, 4096, 795 / 32, "xla",
        ("G", 14, 224), mesh=(8, 1, 4),
    ),
    Published(
        TOOLBOX, "G/14, tensor 8, 8 micro-batches", "a100", 32, 4096, 553 / 32, "xla",
        ("G", 14, 224), mesh=(4, 1, 8),
    ),
    # The batch of 64 a GPU is that of NeMo's configuration for ViT g/14.
    *(
        Published(
            NEMO, "CLIP g/14", "a100", 8 * nodes, 512 * nodes, rate / (8 * nodes), "fused",
            ("g", 14, 224), ("L", 77),
        )
        for nodes, rate in ((1, 559), (2, 1115), (4, 2190), (8, 4407), (16, 8633))
    ),
    *(
        Published(
            NEMO, "CLIP g/14", "h100", 8 * nodes, 512 * nodes, rate / (8 * nodes), "fused",
            ("g", 14, 224), ("L", 77),
        )
        for nodes, rate in ((1, 935), (2, 1795), (4, 3502), (8, 6771), (16, 13829))
    ),
    # Listed, and not judged.
    *(
        Published(
            LAION, model, "a100-40", gpus, gpus * batch, rate, "eager", vision, text, remat="full"
        )
        for model, gpus, batch, rate, vision, text in (
            ("B/32, float16", 824, 96, 228, ("B", 32, 224), ("B-text", 77)),
            ("H/14, float16", 824, 96, 30, ("H", 14, 224), ("L", 77)),
            ("g/14, float16", 800, 40, 20, ("g", 14, 224), ("L", 77)),
            ("H/14, bfloat16", 824, 96, 42, ("H", 14, 224), ("L", 77)),
            ("g/14, bfloat16", 800, 80, 31, ("g", 14, 224), ("L", 77)),
        )
    ),
    *(
        Published(
            OPEN_CLIP, model, "a100-40", gpus, gpus * batch, 32 * 407e6 / (gpus * hours * 3600),
            "eager", vision, text, remat=remat,
        )
        for model, gpus, batch, hours, vision, text, remat in (
            ("B/32", 128, 256, 36, ("B", 32, 224), ("B-text", 77), "none"),
            ("B/16", 176, 192, 61, ("B", 16, 224), ("B-text", 77), "none"),
            ("B/16+", 224, 160, 61, ("B+", 16, 240), ("B+text", 77), "none"),
            ("L/14", 400, 96, 127, ("L", 14, 224), ("L-text", 77), "full"),
        )
    ),
    *(
        Published(PLSC, model, "a100", gpus, 4096, rate / gpus, "eager", vision)
        for model, gpus, rate, vision in (
            ("B/16", 8, 3583, ("B", 16, 224)),
            ("B/16 at 384", 8, 719, ("B", 16, 384)),
            ("L/16", 32, 5256, ("L", 16, 224)),
            ("L/16 at 384", 32, 934, ("L", 16, 384)),
        )
    ),
]  # fmt: skip
JUDGED = [row for row in ROWS if row.software != "eager"]
