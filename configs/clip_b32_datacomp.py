"""CLIP ViT-B/32 on DataComp shards, 12.8 billion pairs seen (arXiv:2304.14108, scale "large").

`vlm plan configs/clip_b32_datacomp.py --topology v5e:16x16` says:

    peak of a chip                     2.26 GiB of 15.75 GiB (compiled)
    a chip sends: gradient reduction   609.62 MiB (compiled)
    a chip sends: FSDP gathers         489.51 MiB (compiled)
    a chip sends: loss ring            128.38 MiB (compiled)
    FLOPs of the model and step        1.45 PFLOP (analytic)
    step, bound by compute             74.4 to 112 ms, 294k to 440k pairs/s (expected)
    MFU                                26 to 39% (expected)
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
    **recipes.clip("B/32"),
    name="clip-b32-datacomp",
    data=DataConfig(
        source="gs://BUCKET/datacomp/*.tar",
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
    examples=12_800_000_000,
    remat="dots_no_batch",
    checkpoint_every=0.01,
)
