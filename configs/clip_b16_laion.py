"""CLIP ViT-B/16 on LAION-2B shards, 34 billion pairs seen (arXiv:2212.07143).

`vlm plan configs/clip_b16_laion.py --topology v5e:16x16` says:

    peak of a chip                    7.85 GiB of 16 (compiled; the loss alone 0.68 MiB)
    sent by a chip and step           gradients 569 MiB, loss ring 128 MiB (compiled)
    FLOPs of the model and step       4.04 PFLOP (analytic)
    step, bound by compute            121 ms, 270,000 pairs/s, MFU 66% (guess, compiled program)
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
    name="clip-b16-laion",
    model=clip("B/16"),
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
        source="gs://BUCKET/laion2b-en/{000000..231349}.tar",
        eval_split=None,
        captions=("txt",),
        augment=AugmentConfig(crop=(0.9, 1.0)),
        workers=16,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.005, weight_decay=0.2),
    batch_size=32_768,
    examples=34_000_000_000,
    remat="dots_no_batch",
    checkpoint_every=0.01,
)
