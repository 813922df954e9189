"""Writes `golden/bv_lit`: a small LiT with a BERT in big_vision's layout, and what it computes.

The reference is transformers' `BertModel` and timm's `VisionTransformer`, whose parameters are
written under the names of https://github.com/google-research/vision_transformer (lit.ipynb).
Run with the extra `peers` installed: python tests/weights/make_lit.py
"""

import functools
import math
import pathlib

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from transformers import BertConfig, BertModel

GOLDEN = pathlib.Path(__file__).parent / "golden" / "bv_lit"
IMAGE = {"img_size": 28, "patch_size": 7, "embed_dim": 18, "depth": 2, "num_heads": 3}
IMAGE_MLP, WIDTH, HEADS, DEPTH, MLP, LENGTH, POSITIONS = 26, 15, 3, 3, 22, 16, 21


def lit(
    vision: VisionTransformer, bert: BertModel, head: torch.nn.Linear, scale: float
) -> dict[str, np.ndarray]:
    """Both towers as one flat file."""
    out = {"t": np.float32([scale])}

    def add(name, tensor, *shape):
        out[name] = tensor.detach().numpy().reshape(shape or tensor.shape).copy()

    def dense(name, layer, kernel=(), bias=()):
        add(f"{name}/kernel", layer.weight.T, *kernel)
        add(f"{name}/bias", layer.bias, *bias)

    def norm(name, layer):
        add(f"{name}/scale", layer.weight)
        add(f"{name}/bias", layer.bias)

    width, heads = vision.embed_dim, vision.blocks[0].attn.num_heads
    split = (heads, width // heads)
    add("img/cls", vision.cls_token)
    add("img/Transformer/posembed_input/pos_embedding", vision.pos_embed)
    add("img/embedding/kernel", vision.patch_embed.proj.weight.permute(2, 3, 1, 0))
    add("img/embedding/bias", vision.patch_embed.proj.bias)
    for i, block in enumerate(vision.blocks):
        layer = f"img/Transformer/encoderblock_{i}"
        attention = f"{layer}/MultiHeadDotProductAttention_0"
        norm(f"{layer}/LayerNorm_0", block.norm1)
        norm(f"{layer}/LayerNorm_1", block.norm2)
        kernels, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            add(f"{attention}/{part}/kernel", kernel.T, width, *split)
            add(f"{attention}/{part}/bias", bias, *split)
        dense(f"{attention}/out", block.attn.proj, (*split, width))
        dense(f"{layer}/MlpBlock_0/Dense_0", block.mlp.fc1)
        dense(f"{layer}/MlpBlock_0/Dense_1", block.mlp.fc2)
    norm("img/Transformer/encoder_norm", vision.norm)
    if isinstance(vision.head, torch.nn.Linear):
        dense("img/head", vision.head)

    encoder, tables = "txt/BertEncoder_0", bert.embeddings
    for kind, table in (
        ("token", tables.word_embeddings),
        ("position", tables.position_embeddings),
        ("segment", tables.token_type_embeddings),
    ):
        add(f"{encoder}/embedder/embedders_{kind}_ids/embedding", table.weight)
    norm(f"{encoder}/layer_norm", tables.LayerNorm)
    for i, block in enumerate(bert.encoder.layer):
        layer = f"{encoder}/encoder_block/layer_sequence/layers_{i}"
        for part in ("query", "key", "value"):
            projection = getattr(block.attention.self, part)
            dense(f"{layer}/attention_block/attention_layer/{part}", projection)
        dense(f"{layer}/attention_block/dense_layer", block.attention.output.dense)
        norm(f"{layer}/attention_block/layer_norm", block.attention.output.LayerNorm)
        dense(f"{layer}/mlp_block/mlp/dense_layer", block.intermediate.dense)
        dense(f"{layer}/mlp_block/dense_layer", block.output.dense)
        norm(f"{layer}/mlp_block/layer_norm", block.output.LayerNorm)
    dense("txt/head", head)
    return out


def towers(
    image: dict[str, int], image_mlp: int, text: dict[str, int], out: int, image_head: bool
) -> tuple[VisionTransformer, BertModel, torch.nn.Linear]:
    """Random towers, every parameter of them in use: norms and biases are random too."""
    vision = VisionTransformer(
        **image, mlp_ratio=image_mlp / image["embed_dim"] + 1e-6, class_token=True,
        global_pool="token", num_classes=out if image_head else 0,
        act_layer=functools.partial(torch.nn.GELU, approximate="tanh"),
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    config = BertConfig(
        **text, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-12, attn_implementation="eager"
    )
    bert = BertModel(config, add_pooling_layer=False)
    head = torch.nn.Linear(config.hidden_size, out)
    for module in (vision, bert, head):
        for name, parameter in module.named_parameters():
            spread = 0.25 if parameter.ndim < 2 else min(0.25, 1 / math.sqrt(parameter.shape[-1]))
            is_scale = "norm" in name.lower() and name.endswith("weight")
            torch.nn.init.normal_(parameter, mean=float(is_scale), std=spread)
        module.eval()
    return vision, bert, head


def embed_text(bert: BertModel, head: torch.nn.Linear, tokens: torch.Tensor) -> np.ndarray:
    """The head on the first token; padding, which is token 0, is masked."""
    states = bert(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    return torch.nn.functional.normalize(head(states[:, 0]), dim=-1).numpy()


def vocabulary() -> list[str]:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [*"0123456789"]
    words = "photo cat dog two cafe stra ##sse ##ing fi of the ab ##ab 東 京 ᄒ ##ᅡ ##ᆫ ι ##ι ก ##า"
    return [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters),
        *".,!?'#[]()-&;$°", *words.split(),
    ]  # fmt: skip


def main() -> None:
    torch.manual_seed(40)
    words = vocabulary()
    text = {
        "vocab_size": len(words), "hidden_size": WIDTH, "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS, "intermediate_size": MLP,
        "max_position_embeddings": POSITIONS, "type_vocab_size": 2,
    }  # fmt: skip
    vision, bert, head = towers(IMAGE, IMAGE_MLP, text, 12, image_head=True)
    GOLDEN.mkdir(exist_ok=True)
    np.savez(GOLDEN / "model.npz", **lit(vision, bert, head, 2.3))
    (GOLDEN / "model.txt").write_text("\n".join(words) + "\n")
    pixels = torch.randn(3, 3, 28, 28)
    tokens = torch.randint(5, len(words), (5, POSITIONS))
    tokens[:, 0] = 2
    for row, length in enumerate((1, 4, 9, LENGTH)):
        tokens[row, length:] = 0
    with torch.no_grad():
        z_image = torch.nn.functional.normalize(vision(pixels), dim=-1).numpy()
        z_short = embed_text(bert, head, tokens[:, :LENGTH])
        z_text = embed_text(bert, head, tokens)
    np.savez_compressed(
        GOLDEN / "expected.npz",
        pixels=pixels.permute(0, 2, 3, 1).numpy(),
        tokens=tokens.numpy().astype(np.int32),
        z_image=z_image,
        z_short=z_short,
        z_text=z_text,
        logits=np.exp(np.float32(2.3)) * z_image @ z_short.T,
    )


if __name__ == "__main__":
    main()
