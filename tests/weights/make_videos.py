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
from transformers import VideoMAEImageProcessorPil, XCLIPConfig, XCLIPModel

GOLDEN = pathlib.Path(__file__).parent / "golden"
FRAMES = 4


def videos(seed) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (FRAMES, *size, 3), np.uint8) for size in [(40, 57), (33, 31)]]


def record(name, model, processor, vocabulary, length, pad, eos, seed, pixels, embed) -> None:
    """Save a model, its inputs and its outputs (`embed` returns videos, texts and logits)."""
    randomise(model, seed)
    model.eval()
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer_files(folder, vocabulary, "PreTrainedTokenizerFast", pad, eos)
    vocabulary.enable_padding(length=length, pad_id=pad, pad_token=vocabulary.id_to_token(pad))
    vocabulary.enable_truncation(length)
    encoded = vocabulary.encode_batch(TEXTS)
    tokens = torch.tensor([e.ids for e in encoded])
    mask = torch.tensor([e.attention_mask for e in encoded])
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

    record(name, XCLIPModel(config), processor, made[0], 13, pad, eos, seed, pixels, embed)


if __name__ == "__main__":
    xclip("video_xclip", seed=71)
