"""CLIP ViT-B/32 on DataComp shards, 12.8 billion pairs seen (arXiv:2304.14108, scale "large").

`vlm plan configs/clip_b32_datacomp.py --topology v5e:16x16` says:

    peak of a chip                    5.54 GiB of 16 (compiled; the loss alone 0.68 MiB)
    sent by a chip and step           gradients 575 MiB, loss ring 128 MiB (compiled)
    FLOPs of the model and step       1.45 PFLOP (analytic)
    step, bound by compute            50 ms, 651,000 pairs/s, MFU 57% (guess, compiled program)
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
    name="clip-b32-datacomp",
    model=clip("B/32"),
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
        source="gs://BUCKET/datacomp/{00000000..00012895}.tar",
        eval_split=None,
        captions=("txt",),
        augment=AugmentConfig(crop=(0.9, 1.0)),
        workers=16,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.005, weight_decay=0.2),
    batch_size=32_768,
    examples=12_800_000_000,
    remat="dots_no_batch",
    checkpoint_every=0.01,
)
