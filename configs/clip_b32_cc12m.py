"""CLIP ViT-B/32 on CC12M shards, on one box of eight GPUs (arXiv:2102.08981).

`vlm plan configs/clip_b32_cc12m.py --topology h100:8` says:

    peak of a chip                     19.57 GiB of 55.88 GiB (analytic)
    a chip sends: gradient reduction   1,009.89 MiB (analytic)
    a chip sends: loss ring            42.00 MiB (analytic)
    FLOPs of the model and step        0.361 PFLOP (analytic)
    step, bound by compute             224 to 336 ms, 24k to 37k pairs/s (expected)
    MFU                                14 to 20% (expected)
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
    name="clip-b32-cc12m",
    data=DataConfig(
        source="/data/cc12m/{00000..01242}.tar",
        eval_split=None,
        captions=("txt",),
        augment=AugmentConfig(crop=(0.5, 1.0)),
        workers=32,
    ),
    evals=(
        imagenet("wds:/data/evals/imagenet1k"),
        coco("wds:/data/evals/coco"),
    ),
    eval_every=1 / 32,  # an epoch
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.03, weight_decay=0.2),
    batch_size=8_192,
    epochs=32,
    remat="dots_no_batch",
)
