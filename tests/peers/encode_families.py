"""Images per second of transformers' image-text models on this CPU, beside transformers, in turns.

    python tests/peers/encode_families.py [NAME ...]

Random weights at published sizes, with the processor of the golden folder of the same layout. Run
with the extra `peers` installed beside vlm.
"""

import json
import pathlib
import shutil
import sys
import tempfile

import jax
import numpy as np
import torch
import transformers
from flax import nnx
from turns import compare_encoders

from vlm.bundle import load

GOLDEN = pathlib.Path(__file__).parents[1] / "weights" / "golden"
L14 = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "patch_size": 14,
}  # fmt: skip
AIMV2 = L14 | {"num_attention_heads": 8, "intermediate_size": 2816, "image_size": 224}
# By name: the golden folder, the class, the vision tower's config, image size, images of a batch.
MODELS = {
    "CLIP L/14@336": ("hf_clip", "CLIP", L14 | {"image_size": 336}, 336, 2),
    "Chinese CLIP B/16": ("hf_chinese_clip", "ChineseCLIP", {"patch_size": 16}, 224, 8),
    "AIMv2 L/14": ("hf_aimv2", "Aimv2", AIMV2, 224, 4),
    "GroupViT": ("hf_groupvit", "GroupViT", {}, 224, 8),
    "OWLv2 B/16@960": ("hf_owlv2", "Owlv2", {"image_size": 960, "patch_size": 16}, 960, 1),
    "X-CLIP B/32": ("video_xclip", "XCLIP", {"num_frames": 8, "patch_size": 32}, 224, 1),
}
KEPT = ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id")


def saved(golden: str, kind: str, vision: dict, size: int, folder: pathlib.Path):
    """Save a random model beside the tokenizer and processor of a golden folder; return it."""
    for file in (GOLDEN / golden).iterdir():
        if file.suffix in (".json", ".txt", ".model") and file.name != "config.json":
            shutil.copy(file, folder)
    small = json.loads((GOLDEN / golden / "config.json").read_text())["text_config"]
    text = {key: value for key, value in small.items() if key in KEPT}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    about, square = json.loads(file.read_text()), {"height": size, "width": size}
    about["size"] = {"shortest_edge": size} if "shortest_edge" in about["size"] else square
    if "crop_size" in about:
        about["crop_size"] = square
    file.write_text(json.dumps(about))
    return model


def compare(name: str, rounds: int = 6) -> None:
    golden, kind, vision, size, batch = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        theirs = saved(golden, kind, vision, size, pathlib.Path(folder))
        ours = load(folder)
    frames = (vision["num_frames"],) if "num_frames" in vision else ()
    pixels = torch.randn(batch, *frames, 3, size, size)
    images = np.ascontiguousarray(np.moveaxis(pixels.numpy(), -3, -1))
    graph, state = nnx.split(ours.model)
    encode = jax.jit(lambda state, x: nnx.merge(graph, state).encode_image(x))
    features = theirs.get_video_features if frames else theirs.get_image_features

    def reference() -> np.ndarray:
        z = features(pixels)
        return torch.nn.functional.normalize(getattr(z, "pooler_output", z), dim=-1).numpy()

    runs = {"vlm": lambda: np.asarray(encode(state, images)), "transformers": reference}
    with torch.inference_mode():
        compare_encoders(name, runs, batch, rounds)


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        compare(name)
