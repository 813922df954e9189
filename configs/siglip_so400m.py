"""SigLIP ViT-So400m/14 on WebDataset shards, 40 billion pairs seen (arXiv:2303.15343).

`vlm plan configs/siglip_so400m.py --topology v5p:4x8x8` says:

    peak of a chip                     20.83 GiB of 95.74 GiB (compiled)
    a chip sends: gradient reduction   3.72 GiB (compiled)
    a chip sends: FSDP gathers         2.77 GiB (compiled)
    a chip sends: loss ring            216.00 MiB (compiled)
    a chip sends: norms and metrics    75.66 MiB (compiled)
    FLOPs of the model and step        26.9 PFLOP (analytic)
    step, bound by compute             411 to 616 ms, 53k to 80k pairs/s (expected)
    MFU                                37 to 56% (expected)
"""

from vlm.config import (
    AugmentConfig,
    DataConfig,
    Experiment,
    MeshConfig,
    OptimizerConfig,
)
from vlm.evaluation.presets import coco, imagenet
from vlm.models import recipes

config = Experiment(
    **recipes.siglip("So400m/14", tokenizer_file="gs://BUCKET/tokenizers/c4_en/tokenizer.json"),
    name="siglip-so400m",
    data=DataConfig(
        source="gs://BUCKET/pairs/*.tar",
        eval_split=None,
        captions=("txt",),
        augment=AugmentConfig(crop=None),
        interleave=1024,  # shards read side by side: several for each worker of 64 hosts
        shuffle=131_072,  # samples, over all readers
        workers=16,
    ),
    evals=(
        imagenet("wds:gs://BUCKET/evals/imagenet1k", templates="siglip"),
        coco("wds:gs://BUCKET/evals/coco"),
    ),
    eval_every=0.02,
    optimizer=OptimizerConfig(
        name="adafactor",
        learning_rate=1e-3,
        b2=0.95,
        weight_decay=1e-4,
        weight_decay_rule="big_vision",
        schedule="rsqrt",
        max_scale=None,
    ),
    mesh=MeshConfig(data=-1, fsdp=8),
    batch_size=32_768,
    examples=40_000_000_000,
    remat="dots_no_batch",
    checkpoint_every=0.01,
)
