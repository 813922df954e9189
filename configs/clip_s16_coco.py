"""CLIP ViT-S/16 on COCO's captions by TFDS, on one device (arXiv:1504.00325).

Prepare the data once with `tfds build coco_captions --file_format array_record`.

`vlm plan configs/clip_s16_coco.py --topology h100:1` says:

    peak of a chip                    13 GiB of 74.5 (analytic)
    FLOPs of the model and step       0.019 PFLOP (analytic)
    step, bound by compute            46 ms, 11,000 pairs/s, MFU 42% (guess)
"""

from vlm.config import (
    AugmentConfig,
    DataConfig,
    Experiment,
    OptimizerConfig,
    PreprocessConfig,
    TokenizerConfig,
)
from vlm.models.variants import clip

config = Experiment(
    name="clip-s16-coco",
    model=clip("S/16"),
    preprocess=PreprocessConfig(
        resize="crop",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
    tokenizer=TokenizerConfig(
        context_length=77, pad_id=0, bos_id=49_406, eos_id=49_407, clean="clip"
    ),
    tokenizer_file="vlm/weights/clip/tokenizer.json",  # OpenAI's, from the root of the repository
    data=DataConfig(
        source="tfds:coco_captions",
        eval_split="val",
        captions=("captions",),
        augment=AugmentConfig(crop=(0.5, 1.0), flip=True),
        workers=8,
    ),
    optimizer=OptimizerConfig(learning_rate=5e-4, weight_decay=0.2),
    batch_size=512,
    epochs=30,
    remat="dots_no_batch",
)
