"""Writes `golden/hf_*`: small random models as transformers saves them, and what they compute.

Run with the extra `peers` installed: python tests/weights/make_huggingface.py
"""

import json
import pathlib

import numpy as np
import tokenizers
import torch
from PIL import Image
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AlignConfig,
    AlignModel,
    AlignProcessor,
    AltCLIPConfig,
    AltCLIPModel,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    EfficientNetImageProcessorPil,
    MetaClip2Config,
    MetaClip2Model,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    Tipsv2Config,
    Tipsv2ImageProcessor,
    Tipsv2Model,
    Tipsv2Processor,
    Tipsv2Tokenizer,
)

GOLDEN = pathlib.Path(__file__).parent / "golden"
TEXTS = ["a photo of a cat", "Two DOGS!", "", "naïve café 🙂", "very long " * 30, "x"]


def images(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [(40, 57), (33, 31), (64, 20)]
    return [rng.integers(0, 256, (*shape, 3)).astype(np.uint8) for shape in shapes]


def small_vocabulary(specials: list[str]) -> tokenizers.Tokenizer:
    vocabulary = tokenizers.Tokenizer(models.BPE())
    vocabulary.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    vocabulary.train_from_iterator(["a photo of a cat", "two dogs", "very long"], trainer)
    return vocabulary


def randomise(model: torch.nn.Module, seed: int) -> None:
    """No parameter keeps the value it starts with, so that a rule that skips one is seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit_scale" in name:
                parameter.fill_(2.3)
            elif "logit_bias" in name:
                parameter.fill_(-3.1)
            elif name == "temperature":
                parameter.fill_(0.07)
            else:
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                spread = 0.3 / max(1.0, parameter.shape[-1] ** 0.5 / 4) if parameter.ndim else 0.1
                parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))


def write_outputs(folder, raw, texts, pixels, tokens, out) -> None:
    """What went into a model, from raw images and texts on, and what came out."""
    np.savez_compressed(
        folder / "outputs.npz",
        **{f"image/{i}": image for i, image in enumerate(raw)},
        pixels=pixels.permute(0, 2, 3, 1).numpy(),
        tokens=tokens.numpy().astype(np.int32),
        z_image=out.image_embeds.numpy(),
        z_text=out.text_embeds.numpy(),
        logits=out.logits_per_image.numpy(),
        texts=np.array(texts),
    )


def record(folder, model, processor, vocabulary, context, pad, eos, seed, masked=False):
    raw = images(seed)
    pixels = processor([Image.fromarray(i) for i in raw], return_tensors="pt")["pixel_values"]
    vocabulary.enable_padding(length=context, pad_id=pad, pad_token=vocabulary.id_to_token(pad))
    vocabulary.enable_truncation(context)
    tokens = torch.tensor([e.ids for e in vocabulary.encode_batch(TEXTS)])
    vocabulary.no_padding()
    vocabulary.no_truncation()
    with torch.no_grad():
        mask = {"attention_mask": (tokens != pad).long()} if masked else {}
        out = model(pixel_values=pixels, input_ids=tokens, **mask)
    write_outputs(folder, raw, TEXTS, pixels, tokens, out)


def tokenizer_files(folder, vocabulary, kind, pad, eos):
    (folder / "tokenizer.json").write_text(vocabulary.to_str())
    about = {"tokenizer_class": kind, "pad_token": vocabulary.id_to_token(pad),
             "eos_token": vocabulary.id_to_token(eos), "model_max_length": 77}  # fmt: skip
    if kind.startswith("Gemma"):  # whose class pads on the left, and whose published files say this
        about["padding_side"] = "right"
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def clip(name: str, *, old: bool, seed: int, worldwide: bool = False) -> None:
    torch.manual_seed(seed)
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    # MetaCLIP 2 has the vocabulary of XLM-R, whose end token is 2.
    vocabulary = small_vocabulary(["<|startoftext|>", "<pad>", "<|endoftext|>"] * worldwide)
    vocabulary.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    bos, eos = (vocabulary.token_to_id(t) for t in ("<|startoftext|>", "<|endoftext|>"))
    kinds = (MetaClip2Config, MetaClip2Model) if worldwide else (CLIPConfig, CLIPModel)
    vocabulary.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", eos), ("<|startoftext|>", bos), False, False
    )
    config = kinds[0](
        text_config={
            "vocab_size": vocabulary.get_vocab_size(), "hidden_size": 24, "intermediate_size": 40,
            "num_hidden_layers": 3, "num_attention_heads": 3, "max_position_embeddings": 13,
            "hidden_act": "gelu" if old else "quick_gelu", "eos_token_id": 2 if old else eos,
            "bos_token_id": bos,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 30, "patch_size": 6,
            "hidden_act": "gelu" if old else "quick_gelu",
        },
        projection_dim=20,
    )  # fmt: skip
    model = kinds[1](config).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 33 if old else 30}, crop_size=30)
    processor.save_pretrained(folder)
    pad = 1 if worldwide else eos
    tokenizer_files(folder, vocabulary, "CLIPTokenizer", pad, eos)
    record(folder, model, processor, vocabulary, 13, pad, eos, seed)
    if worldwide:
        return
    pixels = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        z = model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True)
        z = getattr(z, "pooler_output", z)
    np.savez_compressed(
        folder / "resized.npz", pixels=pixels.permute(0, 2, 3, 1).numpy(), z_image=z.numpy()
    )


def bert_clip(name: str, kind: str, seed: int) -> None:
    """Chinese CLIP, or AltCLIP: CLIP's vision tower, and a text tower of BERT's kind."""
    torch.manual_seed(seed)
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    alt = kind == "altclip"
    specials = ["<s>", "<pad>", "</s>"] if alt else ["[PAD]", "[CLS]", "[SEP]"]
    bos, pad, eos = (0, 1, 2) if alt else (1, 0, 2)
    vocabulary = small_vocabulary(specials)
    first, last = specials[bos], specials[eos]
    vocabulary.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, bos), (last, eos)]
    )
    text = {
        "vocab_size": vocabulary.get_vocab_size(), "hidden_size": 24, "intermediate_size": 37,
        "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 13,
        "pad_token_id": pad,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 30, "patch_size": 6,
    }  # fmt: skip
    if alt:
        config = AltCLIPConfig(
            text_config=text | {"project_dim": 18}, vision_config=vision, projection_dim=20
        )
        model = AltCLIPModel(config).eval()
    else:
        config = ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
        model = ChineseCLIPModel(config).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=30)
    processor.save_pretrained(folder)
    tokenizer_files(folder, vocabulary, "PreTrainedTokenizerFast", pad, eos)
    length = 11 if alt else 13
    record(folder, model, processor, vocabulary, length, pad, eos, seed, masked=True)


def siglip(name: str, *, projection: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = small_vocabulary(["<pad>", "<eos>"])
    vocabulary.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    text = {
        "vocab_size": vocabulary.get_vocab_size(), "hidden_size": 24, "intermediate_size": 37,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 11,
    }  # fmt: skip
    if projection is not None:
        text["projection_size"] = projection
    vision = {
        "hidden_size": projection or 24, "intermediate_size": 35, "num_hidden_layers": 2,
        "num_attention_heads": 2 if projection else 3, "image_size": 28, "patch_size": 7,
    }  # fmt: skip
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    randomise(model, seed)
    model.save_pretrained(folder, max_shard_size="60KB" if projection else "5GB")
    processor = SiglipImageProcessorPil(size={"height": 28, "width": 28}, resample=2)
    processor.save_pretrained(folder)
    tokenizer_files(folder, vocabulary, "GemmaTokenizerFast", 0, 1)
    record(folder, model, processor, vocabulary, 11, 0, 1, seed)


def naflex(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = small_vocabulary(["<pad>", "<eos>"])
    vocabulary.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    text = {
        "vocab_size": vocabulary.get_vocab_size(), "hidden_size": 24, "intermediate_size": 37,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 11,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 43, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_patches": 25, "patch_size": 6,
    }  # fmt: skip
    model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    processor = Siglip2ImageProcessorPil(patch_size=6, max_num_patches=31)
    processor.save_pretrained(folder)
    tokenizer_files(folder, vocabulary, "GemmaTokenizerFast", 0, 1)
    raw = images(seed)
    inputs = processor([Image.fromarray(i) for i in raw], return_tensors="pt")
    vocabulary.enable_padding(length=11, pad_id=0, pad_token="<pad>")
    vocabulary.enable_truncation(11)
    tokens = torch.tensor([e.ids for e in vocabulary.encode_batch(TEXTS)])
    with torch.no_grad():
        out = model(**inputs, input_ids=tokens)
    np.savez_compressed(
        folder / "naflex.npz",
        **{f"image/{i}": image for i, image in enumerate(raw)},
        pixels=inputs["pixel_values"].numpy(),
        mask=inputs["pixel_attention_mask"].numpy(),
        shapes=inputs["spatial_shapes"].numpy(),
        texts=np.array(TEXTS),
        z_image=out.image_embeds.numpy(),
        z_text=out.text_embeds.numpy(),
        logits=out.logits_per_image.numpy(),
    )


# The embedding of an empty text is the mean of nothing, and not a number there.
WORDS = [text for text in TEXTS if text]


def byte_pieces() -> Tipsv2Tokenizer:
    """A small vocabulary of the kind of TIPSv2: merged pieces of words, and bytes for the rest."""
    merges = [("a", "t"), ("\u2581", "a"), ("o", "g"), ("d", "og"), ("\u2581", "dog"), ("c", "at")]
    pieces = ["<pad>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
    pieces += [left + right for left, right in merges]
    return Tipsv2Tokenizer({piece: i for i, piece in enumerate(pieces)}, merges)


def tipsv2(name: str, *, giant: bool, seed: int) -> None:
    """TIPSv2; `giant` has the gated MLP, and transformers' own names of the parameters."""
    torch.manual_seed(seed)
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_pieces()
    config = Tipsv2Config(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 37,
            "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 13,
            "scale_sqrt_depth": not giant,
        },
        vision_config={
            "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 30,
            "patch_size": 6, "mlp_ratio": 2.4, "use_swiglu_ffn": giant,
            "num_register_tokens": 3 if giant else 1,
        },
    )  # fmt: skip
    model = Tipsv2Model(config).eval()
    randomise(model, seed)
    model.save_pretrained(folder, save_original_format=not giant)
    tokenizer.model_max_length = 13
    processor = Tipsv2Processor(Tipsv2ImageProcessor(size={"height": 30, "width": 30}), tokenizer)
    processor.image_processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    raw = images(seed)
    options = {"padding": "max_length", "truncation": True, "max_length": 13}
    inputs = processor(
        images=[Image.fromarray(i) for i in raw], text=WORDS, return_tensors="pt", **options
    )
    larger = torch.rand(2, 3, 42, 42)
    with torch.no_grad():
        out = model(**inputs)
        z_larger = model.get_image_features(pixel_values=larger).pooler_output
    write_outputs(folder, raw, WORDS, inputs["pixel_values"], inputs["input_ids"], out)
    np.savez_compressed(
        folder / "resized.npz", pixels=larger.permute(0, 2, 3, 1).numpy(), z_image=z_larger.numpy()
    )


# As Kakao Brain's, but for the sizes; and two that take the other options of the class.
ALIGN_PIXELS = {
    "size": {"height": 47, "width": 47}, "do_center_crop": True, "crop_size": 37, "resample": 2,
    "rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False,
    "include_top": False,
}  # fmt: skip
OTHER_PIXELS = [
    {"size": {"height": 37, "width": 37}},
    {"size": {"shortest_edge": 41}, "do_center_crop": True, "crop_size": 37, "resample": 1,
     "rescale_factor": 1 / 100, "rescale_offset": True, "image_std": [0.3, 0.4, 0.5]},
    {"do_normalize": False, "size": {"height": 20, "width": 20}},
]  # fmt: skip


def align_vocabulary() -> list[str]:
    """Letters and some pieces of words, as a BERT has them."""
    letters = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
    pieces = ["cat", "photo", "very", "lo", "##ng", "of", "!", "dogs", "\u6f22"]
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*specials, *letters, *(f"##{letter}" for letter in letters), *pieces]


def align(name: str, seed: int) -> None:
    """ALIGN: channels and blocks that are rounded, both paddings of a stride, a window too large.

    The tokenizer is a `vocab.txt`.
    """
    torch.manual_seed(seed)
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    words = align_vocabulary()
    config = AlignConfig(
        text_config={
            "vocab_size": len(words), "hidden_size": 24, "intermediate_size": 37,
            "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 70,
        },
        vision_config={
            "image_size": 50, "width_coefficient": 0.3, "depth_coefficient": 0.6,
            "in_channels": [32, 16, 24, 40], "out_channels": [16, 24, 40, 64],
            "kernel_sizes": [3, 5, 3, 5], "strides": [1, 2, 2, 1], "expand_ratios": [1, 6, 4, 3],
            "num_block_repeats": [1, 4, 1, 2], "depthwise_padding": [2, 4], "hidden_dim": 6,
            "batch_norm_eps": 0.002,
        },
        projection_dim=24,
    )  # fmt: skip
    model = AlignModel(config).eval()
    randomise(model, seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.copy_(torch.randn(module.weight.shape))
                module.weight *= 1.4 / module.weight[0].numel() ** 0.5
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.weight.copy_(1 + 0.3 * torch.randn(module.weight.shape))
                module.running_mean.copy_(0.2 * torch.randn(module.weight.shape))
                module.running_var.copy_(0.5 + torch.rand(module.weight.shape))
    model.save_pretrained(folder)
    processor = EfficientNetImageProcessorPil(**ALIGN_PIXELS)
    processor.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    about = {"tokenizer_class": "BertTokenizer", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    tokenizer = BertTokenizer({word: i for i, word in enumerate(words)})
    raw = [image // (number + 1) for number, image in enumerate(images(seed))]
    texts = [*TEXTS, "Cat\t\u6f22\u5b57 [MASK]"]
    pictures = [Image.fromarray(i) for i in raw]
    inputs = AlignProcessor(processor, tokenizer)(
        images=pictures, text=texts, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**inputs)
    write_outputs(folder, raw, texts, inputs["pixel_values"], inputs["input_ids"], out)
    recorded = {}
    for number, options in enumerate(OTHER_PIXELS):
        processor = EfficientNetImageProcessorPil(**options)
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        recorded[f"config/{number}"] = np.array(processor.to_json_string())
        recorded[f"pixels/{number}"] = pixels.permute(0, 2, 3, 1).numpy()
    np.savez_compressed(folder / "pixels.npz", **recorded)


def pickled() -> None:
    """The weights of `hf_clip` as the shards of a `pytorch_model.bin`, from before safetensors."""
    from safetensors.torch import load_file

    folder = GOLDEN / "hf_clip_bin"
    folder.mkdir(exist_ok=True)
    tensors = load_file(GOLDEN / "hf_clip" / "model.safetensors")
    names, where = sorted(tensors), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shard = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / shard)
        where |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2))


if __name__ == "__main__":
    naflex("hf_naflex", seed=4)
    clip("hf_clip", old=False, seed=0)
    clip("hf_clip_old", old=True, seed=1)
    bert_clip("hf_chinese_clip", "chinese_clip", seed=6)
    bert_clip("hf_altclip", "altclip", seed=7)
    clip("hf_metaclip_2", old=False, seed=5, worldwide=True)
    siglip("hf_siglip", projection=None, seed=2)
    siglip("hf_siglip_wide", projection=28, seed=3)
    tipsv2("hf_tipsv2", giant=False, seed=8)
    tipsv2("hf_tipsv2_giant", giant=True, seed=9)
    align("hf_align", seed=10)
    pickled()
