"""A small CLIP around any tokenizer."""

from flax import nnx

from vlm.bundle import Bundle
from vlm.config import ModelConfig, PreprocessConfig, TextConfig, ViTConfig
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder


def small_clip(tokenizer: Tokenizer, vocab_size: int, context_length: int) -> Bundle:
    """A model of OpenAI's form, with a few thousand parameters beside its embedding table."""
    sizes = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 16, "projection": "linear"}
    config = ModelConfig(
        ViTConfig(
            image_size=16, patch_size=8, pool="class", pre_norm=True, patch_bias=False, **sizes
        ),
        TextConfig(
            vocab_size=vocab_size,
            context_length=context_length,
            causal=True,
            pool="argmax",
            **sizes,
        ),
        embed_dim=16,
        loss="softmax",
    )
    pixels = Preprocess(PreprocessConfig(image_size=16, resize="crop"))
    return Bundle(DualEncoder(config, rngs=nnx.Rngs(0)), pixels, tokenizer, "small-clip")
