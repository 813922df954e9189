"""CLIP ViT-S/16 on COCO's captions in Karpathy's splits, on one device (arXiv:1504.00325).

It reads COCO's own files: /data/coco/dataset_coco.json, train2014/ and val2014/ beside it.

`vlm plan configs/clip_s16_coco.py --topology h100:1` says:

    peak of a chip                     13.09 GiB of 55.88 GiB (analytic)
    FLOPs of the model and step        0.0193 PFLOP (analytic)
    step, bound by compute             107 to 160 ms, 3,195 to 4,793 pairs/s (expected)
    MFU                                12 to 18% (expected)
"""

from vlm.config import (
    AugmentConfig,
    DataConfig,
    Experiment,
    OptimizerConfig,
)
from vlm.evaluation.presets import coco
from vlm.models import recipes

config = Experiment(
    **recipes.clip("S/16"),
    name="clip-s16-coco",
    data=DataConfig(
        source="/data/coco/dataset_coco.json",
        eval_split=None,
        augment=AugmentConfig(crop=(0.5, 1.0), flip=True),
        workers=8,
    ),
    evals=(coco("/data/coco/dataset_coco.json"),),
    eval_every=1 / 30,  # an epoch
    optimizer=OptimizerConfig(learning_rate=5e-4, weight_decay=0.2),
    batch_size=512,
    epochs=30,
    remat="dots_no_batch",
)
