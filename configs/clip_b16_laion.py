"""CLIP ViT-B/16 on LAION-2B shards, 34 billion pairs seen (arXiv:2212.07143).

`vlm plan configs/clip_b16_laion.py --topology v5e:16x16` says:

    peak of a chip                     4.94 GiB of 15.75 GiB (compiled)
    a chip sends: gradient reduction   603.36 MiB (compiled)
    a chip sends: FSDP gathers         486.55 MiB (compiled)
    a chip sends: loss ring            128.38 MiB (compiled)
    FLOPs of the model and step        4.03 PFLOP (analytic)
    step, bound by compute             190 to 286 ms, 115k to 172k pairs/s (expected)
    MFU                                28 to 42% (expected)
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
    **recipes.clip("B/16"),
    name="clip-b16-laion",
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
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.005, weight_decay=0.2),
    batch_size=32_768,
    examples=34_000_000_000,
    remat="dots_no_batch",
    checkpoint_every=0.01,
)
