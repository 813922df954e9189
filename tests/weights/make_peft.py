"""Writes `golden/peft_*`: adapters that `peft` trained on `golden/hf_*`, and what they compute.

Run with the extra `peers` installed: python tests/weights/make_peft.py
"""

import json
import pathlib

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPModel, SiglipModel

GOLDEN = pathlib.Path(__file__).parent / "golden"
LAYERS = ["q_proj", "k_proj", "v_proj", "self_attn.out_proj", "fc1", "fc2"]
ADAPTERS = {
    # Ranks and alphas of their own, a tower alone, and a layer that is left out.
    "peft_clip": (
        "hf_clip",
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["text_model.encoder.layers.0.mlp.fc1", "q_proj", "text_projection"],
            rank_pattern={"text_model.encoder.layers.1.self_attn.q_proj": 2},
            alpha_pattern={"vision_model.*.q_proj": 3},
        ),
    ),
    "peft_clip_rslora": ("hf_clip", LoraConfig(r=4, target_modules=LAYERS, use_rslora=True)),
    "peft_siglip_dora": (
        "hf_siglip",
        LoraConfig(
            r=3,
            target_modules=r".*(layers\.\d+|head)\.(self_attn|mlp)\.(q_proj|v_proj|fc\d)",
            use_dora=True,
        ),
    ),
}


def transformers_model(folder: pathlib.Path) -> torch.nn.Module:
    kind = SiglipModel if "siglip" in folder.name else CLIPModel
    return kind.from_pretrained(folder).eval()


def embeddings(model: torch.nn.Module, golden) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-norm embeddings of the golden pixels and tokens."""
    pixels = torch.from_numpy(golden["pixels"].transpose(0, 3, 1, 2).copy())
    out = model(input_ids=torch.from_numpy(golden["tokens"]).long(), pixel_values=pixels)
    return out.image_embeds, out.text_embeds


def train(model: torch.nn.Module, golden, steps: int = 20) -> None:
    """Pull each image towards the text of its number, so that no factor stays as it began."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    for _ in range(steps):
        z_image, z_text = embeddings(model, golden)
        loss = -(z_image * z_text[: len(z_image)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    for name, (base, config) in ADAPTERS.items():
        torch.manual_seed(0)
        golden = np.load(GOLDEN / base / "outputs.npz")
        model = get_peft_model(transformers_model(GOLDEN / base), config)
        train(model, golden)
        with torch.inference_mode():
            z_image, z_text = embeddings(model, golden)
        model.save_pretrained(GOLDEN / name)
        (GOLDEN / name / "README.md").unlink()
        file = GOLDEN / name / "adapter_config.json"
        about = json.loads(file.read_text()) | {"base_model_name_or_path": base}
        file.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
        np.savez(GOLDEN / name / "adapted.npz", z_image=z_image.numpy(), z_text=z_text.numpy())


if __name__ == "__main__":
    main()
