"""Writes goldens of video models: small random models of transformers, and their outputs.

Run with the extra `peers` installed: python tests/weights/make_videos.py
"""

import pathlib
import shutil

import numpy as np
import torch
from make_dual_encoders import text_of, vocabulary_of
from make_huggingface import TEXTS, randomise, tokenizer_files
from PIL import Image
from transformers import (
    LlavaOnevisionVideoProcessor,
    VideoMAEImageProcessorPil,
    VideoPrismClipModel,
    VideoPrismConfig,
    VideoPrismProcessor,
    VideoPrismTokenizer,
    XCLIPConfig,
    XCLIPModel,
)

GOLDEN = pathlib.Path(__file__).parent / "golden"
FRAMES = 4


def videos(seed) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (FRAMES, *size, 3), np.uint8) for size in [(40, 57), (33, 31)]]


def saved(name, model, processor, seed) -> pathlib.Path:
    """Save a model with random weights in a new folder."""
    randomise(model, seed)
    model.eval()
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def record(folder, model, tokens, mask, seed, pixels, embed) -> None:
    """Write inputs and outputs of a model (`embed` returns videos, texts and logits)."""
    with torch.no_grad():
        z_video, z_text, logits = embed(model, pixels, tokens, mask)
    np.savez_compressed(
        folder / "video.npz",
        **{f"video/{i}": video for i, video in enumerate(videos(seed))},
        pixels=pixels.permute(0, 1, 3, 4, 2).numpy(),
        tokens=tokens.numpy().astype(np.int32),
        texts=np.array(TEXTS),
        z_video=z_video.numpy(),
        z_text=z_text.numpy(),
        logits=logits.numpy(),
    )


def xclip(name, seed, projection_dim=24) -> None:
    made = vocabulary_of("clip")
    _, _, pad, eos = made
    text = text_of("clip", *made) | {"eos_token_id": 2}
    vision = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "intermediate_size": 40, "num_frames": FRAMES,
        "mit_hidden_size": projection_dim, "mit_intermediate_size": 28, "mit_num_hidden_layers": 2,
        "mit_num_attention_heads": 3,
    }  # fmt: skip
    config = XCLIPConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=projection_dim,
        prompt_layers=2,
        prompt_num_attention_heads=4,
    )
    square = {"height": 32, "width": 32}
    processor = VideoMAEImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
    pixels = torch.cat([
        processor([Image.fromarray(f) for f in v], return_tensors="pt")["pixel_values"]
        for v in videos(seed)
    ])  # fmt: skip

    def embed(model, pixels, tokens, mask):
        out = model(pixel_values=pixels, input_ids=tokens, attention_mask=mask)
        z_video = model.get_video_features(pixels).pooler_output
        z_text = model.get_text_features(tokens, mask).pooler_output
        return z_video, z_text, out.logits_per_video

    model, vocabulary = XCLIPModel(config), made[0]
    folder = saved(name, model, processor, seed)
    tokenizer_files(folder, vocabulary, "PreTrainedTokenizerFast", pad, eos)
    vocabulary.enable_padding(length=13, pad_id=pad, pad_token=vocabulary.id_to_token(pad))
    vocabulary.enable_truncation(13)
    encoded = vocabulary.encode_batch(TEXTS)
    tokens = torch.tensor([e.ids for e in encoded])
    mask = torch.tensor([e.attention_mask for e in encoded])
    record(folder, model, tokens, mask, seed, pixels, embed)


def videoprism(name, seed) -> None:
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -3 - i / 100) for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz!é")]
    words = [("▁a", -2.5), ("▁photo", -3.9), ("▁of", -3.8), ("cat", -3.7), ("▁very", -3.6)]
    vocabulary = [*specials, *letters, *words]
    common = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 42}
    vision = common | {
        "image_size": 36, "tubelet_size": [1, 9, 9], "num_frames": FRAMES, "num_spatial_layers": 3,
        "num_temporal_layers": 2, "num_auxiliary_layers": 2, "attn_logit_softcapping": 1.5,
    }  # fmt: skip
    text = common | {
        "vocab_size": len(vocabulary), "num_hidden_layers": 2, "max_position_embeddings": 13,
        "attn_logit_softcapping": 2.0,
    }  # fmt: skip
    model = VideoPrismClipModel(VideoPrismConfig(text_config=text, vision_config=vision))
    size = {"height": 36, "width": 36}
    frames = LlavaOnevisionVideoProcessor(
        size=size, do_normalize=False, do_sample_frames=True, num_frames=FRAMES
    )
    # Its extra tokens have no row in the embedding table, as in the published models.
    processor = VideoPrismProcessor(frames, VideoPrismTokenizer(vocab=vocabulary, extra_ids=5))
    folder = saved(name, model, processor, seed)
    made = [processor(videos=[v], return_tensors="pt") for v in videos(seed)]
    pixels = torch.cat([one["pixel_values_videos"] for one in made])
    options = {"padding": "max_length", "truncation": True, "max_length": 13}
    encoded = processor(text=TEXTS, return_tensors="pt", **options)

    def embed(model, pixels, tokens, mask):
        z_video = model.get_video_features(pixels).pooler_output[:, 0]
        z_text = model.get_text_features(tokens, mask).pooler_output
        return z_video, z_text, z_video @ z_text.T

    record(folder, model, encoded["input_ids"], encoded["attention_mask"], seed, pixels, embed)


if __name__ == "__main__":
    xclip("video_xclip", seed=71)
    videoprism("video_videoprism", seed=72)
