"""CLIP ViT-B/16 on LAION-2B shards, 34 billion pairs seen (arXiv:2212.07143).

`vlm plan configs/clip_b16_laion.py --topology v5e:16x16` says:

    peak of a chip                    7.85 GiB of 16 (compiled; the loss alone 0.68 MiB)
    sent by a chip and step           gradients 569 MiB, loss ring 128 MiB (compiled)
    FLOPs of the model and step       4.04 PFLOP (analytic)
    step, bound by compute            198 to 296 ms, 111k to 166k pairs/s, MFU 27 to 41% (analytic)
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
