"""open_clip's plain ViT on OpenMoji: its architecture, recipe, batch and epochs, trained here.

    vlm train tests/peers/openmoji_plain.py

Image 64, patch 8, width 192, depth 6; text of 4 layers; crops of 0.5 to 1, jitter 0.3, AdamW at
1e-3, batch 256, 30 epochs. open_clip 3.3 reached 31.5% top-1 and 79.8% top-5 over all captions.
"""

from vlm import config as c

tower = {"width": 192, "heads": 4, "mlp_dim": 768, "activation": "gelu", "norm_eps": 1e-5}
config = c.Experiment(
    name="openmoji-plain",
    model=c.ModelConfig(
        vision=c.ViTConfig(
            image_size=64,
            patch_size=8,
            depth=6,
            pool="class",
            pre_norm=True,
            patch_bias=False,
            projection="linear",
            **tower,
        ),
        text=c.TextConfig(
            vocab_size=2048,
            context_length=24,
            depth=4,
            causal=True,
            pool="end",
            end_id=1,
            projection="linear",
            **tower,
        ),
        embed_dim=192,
    ),
    preprocess=c.PreprocessConfig(image_size=64),
    tokenizer=c.TokenizerConfig(context_length=24),
    data=c.DataConfig(
        source="openmoji",
        train_split="train+validation",
        augment=c.AugmentConfig(crop=(0.5, 1.0), jitter=0.3),
        cache=True,
    ),
    optimizer=c.OptimizerConfig(learning_rate=1e-3),
    batch_size=256,
    epochs=30,
    scan=False,  # a few blocks: faster unrolled
    remat="none",
)
