"""CLIP ViT-L/14 on LAION-2B shards, 34 billion pairs seen (arXiv:2212.07143).

`vlm plan configs/clip_l14_laion.py --topology v5p:4x4x8` says:

    peak of a chip                     32.59 GiB of 95.74 GiB (compiled)
    a chip sends: gradient reduction   1.67 GiB (compiled)
    a chip sends: FSDP gathers         1.42 GiB (compiled)
    a chip sends: loss ring            192.12 MiB (compiled)
    FLOPs of the model and step        17.2 PFLOP (analytic)
    step, bound by compute             521 to 781 ms, 42k to 63k pairs/s (expected)
    MFU                                38 to 56% (expected)
"""

from vlm.config import (
    AugmentConfig,
    DataConfig,
    Experiment,
    OptimizerConfig,
)
from vlm.evaluation.presets import coco, imagenet
from vlm.models import recipes

config = Experiment(
    **recipes.clip("L/14"),
    name="clip-l14-laion",
    data=DataConfig(
        source="gs://BUCKET/laion2b-en/*.tar",
        eval_split=None,
        captions=("txt",),
        augment=AugmentConfig(crop=(0.9, 1.0)),
        interleave=1024,  # shards read side by side: several for each worker of 64 hosts
        shuffle=131_072,  # samples, over all readers
        workers=16,
    ),
    evals=(
        imagenet("wds:gs://BUCKET/evals/imagenet1k"),
        coco("wds:gs://BUCKET/evals/coco"),
    ),
    eval_every=0.02,
    optimizer=OptimizerConfig(learning_rate=5e-4, warmup=0.005, weight_decay=0.2),
    batch_size=32_768,
    examples=34_000_000_000,
    remat="dots",
    checkpoint_every=0.01,
)
