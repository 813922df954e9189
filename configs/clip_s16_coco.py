"""CLIP ViT-S/16 on COCO's captions by TFDS, on one device (arXiv:1504.00325).

Prepare the data once with `tfds build coco_captions --file_format array_record`.

`vlm plan configs/clip_s16_coco.py --topology h100:1` says:

    peak of a chip                    13 GiB of 74.5 (analytic)
    FLOPs of the model and step       0.019 PFLOP (analytic)
    step, bound by compute            107 to 160 ms, 3.2k to 4.8k pairs/s, MFU 12 to 18% (by hand)
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
        source="tfds:coco_captions",
        eval_split=None,
        captions=("captions/text",),
        augment=AugmentConfig(crop=(0.5, 1.0), flip=True),
        workers=8,
    ),
    evals=(coco(),),
    eval_every=1 / 30,  # an epoch
    optimizer=OptimizerConfig(learning_rate=5e-4, weight_decay=0.2),
    batch_size=512,
    epochs=30,
    remat="dots_no_batch",
)
