"""Writes `golden/hf_fgclip2`: a small random FG-CLIP 2, and what its authors' code computes.

That is https://github.com/360CVGroup/FG-CLIP, written for transformers 4.57: with that release in
place of the one of the extra `peers`, run python tests/weights/make_fgclip2.py CHECKOUT
"""

import pathlib
import sys

import numpy as np
import tokenizers
import torch
from PIL import Image
from transformers import GemmaTokenizerFast, Siglip2ImageProcessorFast

sys.path.append(sys.argv[1])
from fgclip2.model.strcs.configuration_fgclip2 import Fgclip2Config
from fgclip2.model.strcs.modeling_fgclip2 import Fgclip2Model

GOLDEN = pathlib.Path(__file__).parent / "golden"
FOLDER = GOLDEN / "hf_fgclip2"
TEXTS = ["a photo of a cat", "Two DOGS!", "", "naïve café 🙂 ΟΔΟΣ İ", "very long " * 30, "一只猫",
         "a <EOS> cat, two <eos> dogs and one more"]  # fmt: skip
LENGTHS = {6: "short", 11: "short", 23: "long"}  # tokens of a text, and its way


def tokenizer() -> GemmaTokenizerFast:
    """The vocabulary of the small NaFlex model, which then makes no letter small itself."""
    vocabulary = tokenizers.Tokenizer.from_file(str(GOLDEN / "hf_naflex" / "tokenizer.json"))
    vocabulary.normalizer = tokenizers.normalizers.NFC()
    FOLDER.mkdir(parents=True, exist_ok=True)
    vocabulary.save(str(FOLDER / "tokenizer.json"))
    return GemmaTokenizerFast(
        tokenizer_file=str(FOLDER / "tokenizer.json"),
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_input_names=["input_ids"],
    )


def randomise(model: torch.nn.Module) -> None:
    """No parameter keeps the value it starts with, so that a rule that skips one is seen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.25)
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-3.1)


def main() -> None:
    torch.manual_seed(11)
    words = tokenizer()
    text = {
        "vocab_size": len(words), "hidden_size": 24, "intermediate_size": 37, "keep_len": 5,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 11,
        "longtext_len": 23,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 43, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_patches": 25, "patch_size": 6,
    }  # fmt: skip
    model = Fgclip2Model(Fgclip2Config(text_config=text, vision_config=vision)).eval()
    randomise(model)
    model.save_pretrained(FOLDER)
    words.save_pretrained(FOLDER)
    processor = Siglip2ImageProcessorFast(patch_size=6, max_num_patches=31)  # as they publish
    processor.save_pretrained(FOLDER)
    naflex = np.load(GOLDEN / "hf_naflex" / "naflex.npz")
    raw = [naflex[f"image/{i}"] for i in range(3)]
    pixels = processor([Image.fromarray(i) for i in raw], return_tensors="pt")
    recorded = {f"image/{i}": image for i, image in enumerate(raw)} | {"texts": np.array(TEXTS)}
    for length, way in LENGTHS.items():
        tokens = words(
            [text.lower() for text in TEXTS], padding="max_length", max_length=length,
            truncation=True, return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            out = model(**pixels, **tokens, walk_type=way)
        recorded[f"tokens/{length}"] = tokens["input_ids"].numpy().astype(np.int32)
        recorded[f"z_text/{length}"] = out.text_embeds.numpy()
        recorded[f"logits/{length}"] = out.logits_per_image.numpy()
        recorded["z_image"] = out.image_embeds.numpy()
    np.savez_compressed(FOLDER / "fgclip2.npz", **recorded)


if __name__ == "__main__":
    main()
