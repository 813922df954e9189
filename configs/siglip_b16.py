"""SigLIP ViT-B/16 on WebDataset shards, 40 billion pairs seen (arXiv:2303.15343).

The paper's data is not public; any shards of images and texts serve.

`vlm plan configs/siglip_b16.py --topology v5e:16x16` says:

    peak of a chip                     5.36 GiB of 15.75 GiB (compiled)
    a chip sends: gradient reduction   819.98 MiB (compiled)
    a chip sends: FSDP gathers         666.57 MiB (compiled)
    a chip sends: loss ring            144.00 MiB (compiled)
    FLOPs of the model and step        4.56 PFLOP (analytic)
    step, bound by compute             210 to 316 ms, 104k to 156k pairs/s (expected)
    MFU                                29 to 43% (expected)
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
    name="siglip-b16",
    data=DataConfig(
        source="gs://BUCKET/pairs/*.tar",
        eval_split=None,
        captions=("txt",),
        augment=AugmentConfig(crop=None),
        interleave=1024,  # shards read side by side: several for each worker of 64 hosts
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
    batch_size=32_768,
    examples=40_000_000_000,
    remat="dots_no_batch",
    checkpoint_every=0.01,
)
