"""SigLIP ViT-B/16 at a batch of 1,048,576 pairs on 512 chips (arXiv:2303.15343, section 4.2).

`vlm plan configs/siglip_b16_1m.py --topology v5p:8x8x8` says:

    peak of a chip                     22.56 GiB of 95.74 GiB (compiled)
    a chip sends: loss ring            4.50 GiB (compiled)
    a chip sends: gradient reduction   823.01 MiB (compiled)
    a chip sends: FSDP gathers         666.57 MiB (compiled)
    FLOPs of the model and step        151 PFLOP (analytic)
    step, bound by compute             1.45 to 2.18 s, 481k to 722k pairs/s (expected)
    MFU                                29 to 44% (expected)
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
    **recipes.siglip("B/16", tokenizer_file="gs://BUCKET/tokenizers/c4_en/tokenizer.json"),
    name="siglip-b16-1m",
    data=DataConfig(
        source="gs://BUCKET/pairs/*.tar",
        eval_split=None,
        captions=("txt",),
        augment=AugmentConfig(crop=None),
        interleave=4096,  # shards read side by side: one for each worker of 256 hosts
        shuffle=131_072,  # samples, over all readers
        workers=16,
    ),
    evals=(
        imagenet("wds:gs://BUCKET/evals/imagenet1k", templates="siglip"),
        coco("wds:gs://BUCKET/evals/coco"),
    ),
    eval_every=0.02,
    optimizer=OptimizerConfig(
        name="adafactor",
        learning_rate=1e-3,
        b2=0.95,
        weight_decay=1e-4,
        weight_decay_rule="big_vision",
        schedule="rsqrt",
        max_scale=None,
    ),
    batch_size=1_048_576,
    examples=40_000_000_000,
    remat="full",
    checkpoint_every=0.02,
)
