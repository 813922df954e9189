"""Writes `golden/tips_jax`: a small TIPSv2 in its authors' form for JAX, and what it computes.

The reference is transformers' `Tipsv2Model`, set as that code is (tanh-GELU, an epsilon of 1e-6, no
layer scale, no position of the class token), whose parameters are written under the names of
https://github.com/google-deepmind/tips (scenic/). Tokens are those of the sentencepiece library.
Run with the extra `peers` installed: python tests/weights/make_tips.py
"""

import pathlib
import tempfile

import numpy as np
import sentencepiece
import torch
from make_huggingface import images, randomise
from PIL import Image
from transformers import Tipsv2Config, Tipsv2Model

GOLDEN = pathlib.Path(__file__).parent / "golden" / "tips_jax"
CORPUS = """a photo of a cat
two dogs on the beach, running
the quick brown fox jumps over the lazy dog
a very long sentence about nothing at all but words and words
"""
TEXTS = ["a photo of a cat", "Two DOGS!", " ÉCOLE\tcafé 🙂  ", "hello_world: <pad> 3.14", "ﬁne ½",
         "many words " * 40]  # fmt: skip
ASCII = {letter: letter + 32 for letter in range(ord("A"), ord("Z") + 1)}
WIDTH, IMAGE, PATCH, LENGTH = 24, 30, 6, 64


def vocabulary() -> sentencepiece.SentencePieceProcessor:
    with tempfile.TemporaryDirectory() as folder:
        corpus, rules = pathlib.Path(folder) / "corpus.txt", pathlib.Path(folder) / "rules.tsv"
        corpus.write_text(CORPUS * 20)
        rules.write_text("FB01\t66 69\n9\t20\n")  # a few of NFKC's: all of them take 240 kB
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=f"{folder}/small", model_type="bpe", vocab_size=330,
            pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, byte_fallback=True, hard_vocab_limit=False,
            minloglevel=2, normalization_rule_tsv=str(rules),
        )  # fmt: skip
        data = pathlib.Path(f"{folder}/small.model").read_bytes()
        # The trainer notes the paths of its files, which nothing reads.
        data = data.replace(str(corpus).encode(), b"c" * len(str(corpus)))
        data = data.replace(f"{folder}/small".encode(), b"m" * len(f"{folder}/small"))
        data = data.replace(str(rules).encode(), b"r" * len(str(rules)))
    (GOLDEN / "tokenizer.model").write_bytes(data)
    return sentencepiece.SentencePieceProcessor(model_proto=data)


def layers(model: torch.nn.Module, theirs: str, out: dict[str, np.ndarray], heads: int) -> None:
    """The blocks of either tower."""
    for i, block in enumerate(model):
        vision = hasattr(block, "attention")
        attention = block.attention if vision else block.self_attn
        name = f"{theirs}/encoderblock_{i}"
        norm(block.norm1 if vision else block.layer_norm1, f"{name}/LayerNorm_0", out)
        norm(block.norm2 if vision else block.layer_norm2, f"{name}/LayerNorm_1", out)
        for part in ("q", "k", "v"):
            full = {"q": "query", "k": "key", "v": "value"}[part]
            place = f"{name}/MultiHeadDotProductAttention_0/{full}"
            linear = getattr(attention, f"{part}_proj")
            out[f"{place}/kernel"] = linear.weight.T.reshape(WIDTH, heads, WIDTH // heads)
            out[f"{place}/bias"] = linear.bias.reshape(heads, WIDTH // heads)
        last = attention.o_proj if vision else attention.out_proj
        place = f"{name}/MultiHeadDotProductAttention_0/out"
        out[f"{place}/kernel"] = last.weight.T.reshape(heads, WIDTH // heads, WIDTH)
        out[f"{place}/bias"] = last.bias
        gated = hasattr(block.mlp, "gate_proj")
        parts = ("gate_proj", "up_proj", "down_proj") if gated else ("fc1", "fc2")
        for number, part in enumerate(parts):
            kind = "FFNSwiGluFused_0" if gated else "MlpBlock_0"
            dense(getattr(block.mlp, part), f"{name}/{kind}/Dense_{number}", out)


def dense(layer: torch.nn.Module, name: str, out: dict) -> None:
    out[f"{name}/kernel"], out[f"{name}/bias"] = layer.weight.T, layer.bias


def norm(layer: torch.nn.Module, name: str, out: dict) -> None:
    out[f"{name}/scale"], out[f"{name}/bias"] = layer.weight, layer.bias


def save(name: str, out: dict[str, torch.Tensor]) -> None:
    arrays = {key: np.array(value.detach().numpy(), order="C") for key, value in out.items()}
    np.savez(GOLDEN / f"small_{name}.npz", **arrays)


def main() -> None:
    torch.manual_seed(10)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    pieces = vocabulary()
    config = Tipsv2Config(
        text_config={
            "vocab_size": pieces.get_piece_size(), "hidden_size": WIDTH, "intermediate_size": 37,
            "num_hidden_layers": 2, "num_attention_heads": 3, "layer_norm_eps": 1e-6,
        },
        vision_config={
            "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": IMAGE, "patch_size": PATCH, "mlp_ratio": 2.4,
            "hidden_act": "gelu_pytorch_tanh", "use_swiglu_ffn": True,
        },
    )  # fmt: skip
    model = Tipsv2Model(config).eval()
    randomise(model, 10)
    image, text = model.vision_model, model.text_model
    with torch.no_grad():
        image.embeddings.position_embeddings[:, 0] = 0
        for block in image.encoder.layer:
            block.layer_scale1.lambda1.fill_(1)
            block.layer_scale2.lambda1.fill_(1)
    tables, grid = image.embeddings, IMAGE // PATCH
    tokens = "encoder/ToTokenSequence_0"
    out = {
        f"{tokens}/embedding/kernel": tables.patch_embeddings.projection.weight.permute(2, 3, 1, 0),
        f"{tokens}/embedding/bias": tables.patch_embeddings.projection.bias,
        f"{tokens}/posembed_input": tables.position_embeddings[:, 1:].reshape(1, grid, grid, WIDTH),
        f"{tokens}/cls": torch.cat([tables.cls_token, tables.register_tokens], 1),
    }
    layers(image.encoder.layer, "encoder/transformer", out, 2)
    norm(image.layernorm, "encoder/encoder_norm", out)
    save("vision", out)
    out = {
        "token_emb/emb_var": text.embeddings.token_embedding.weight,
        "temperature_contrastive": model.temperature,
    }
    layers(text.encoder.layers, "transformer", out, 3)
    norm(text.final_layer_norm, "text_encoder_norm", out)
    save("text", out)

    raw = images(10)
    pixels = [Image.fromarray(i).resize((IMAGE, IMAGE), Image.Resampling.BILINEAR) for i in raw]
    pixels = np.stack([np.asarray(i) for i in pixels]).astype(np.float32) / np.float32(255)
    rows = np.zeros((len(TEXTS), LENGTH), np.int32)
    for row, words in zip(rows, TEXTS, strict=True):
        ids = pieces.encode(words.translate(ASCII))[:LENGTH]
        row[: len(ids)] = ids
    larger = torch.rand(2, 3, 42, 42)
    with torch.no_grad():
        found = model(
            pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2),
            input_ids=torch.from_numpy(rows).long(),
            attention_mask=torch.from_numpy(rows != 0).long(),
        )
        z_larger = model.get_image_features(pixel_values=larger).pooler_output
    np.savez_compressed(
        GOLDEN / "outputs.npz",
        **{f"image/{i}": image for i, image in enumerate(raw)},
        pixels=pixels,
        tokens=rows,
        z_image=found.image_embeds.numpy(),
        z_text=found.text_embeds.numpy(),
        logits=found.logits_per_image.numpy(),
        texts=np.array(TEXTS),
    )
    np.savez_compressed(
        GOLDEN / "resized.npz", pixels=larger.permute(0, 2, 3, 1).numpy(), z_image=z_larger.numpy()
    )


if __name__ == "__main__":
    main()
