"""Whole models beside transformers and open_clip: features, logits, and writing back.

Random weights at published sizes, saved by their own code and loaded as a user's folder would be.
Run with the extra `peers` installed beside vlm: python tests/peers/models.py [NAME ...]
"""

import gc
import json
import pathlib
import sys
import tempfile
import time

import numpy as np
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "weights")]
TEXTS = ["a photo of a cat", "two dogs running on the beach", "", "naïve café 🙂", "long " * 100]


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    out = []
    for height, width in ((480, 640), (300, 200), (64, 900), (224, 224)):
        y, x = np.mgrid[:height, :width]
        ramp = np.stack([x * 255 // width, y * 255 // height, (x // 7 + y // 9) % 2 * 255], -1)
        noise = rng.integers(-40, 40, ramp.shape)
        out.append(Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8)))
    return out


def unit(x: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(x, dim=-1).numpy()


def compare(name: str, folder: pathlib.Path, z_image, z_text, logits, texts=TEXTS) -> None:
    from vlm.bundle import load

    start = time.perf_counter()
    bundle = load(folder)
    seconds = time.perf_counter() - start
    ours_image, ours_text = bundle.encode_image(pictures()), bundle.encode_text(texts)
    ours = bundle.logit_scale * ours_image @ ours_text.T + bundle.logit_bias
    differences = [np.abs(a - b).max() for a, b in ((ours_image, z_image), (ours_text, z_text))]
    print(
        f"{name:34} image {differences[0]:.1e}  text {differences[1]:.1e}  "
        f"logits {np.abs(ours - logits).max():.1e}  loaded in {seconds:.1f} s",
        flush=True,
    )


def open_clip_model(name: str) -> None:
    import open_clip
    import safetensors.torch
    from open_clip.transform import PreprocessCfg, image_transform_v2

    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    if "MobileCLIP" in name and "L-14" not in name:
        random_numbers(model, 256)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        config = open_clip.get_model_config(name)
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3} if "SigLIP" in name else {}
        if "SigLIP" in name:
            preprocess["resize_mode"] = "squash"
        if "MobileCLIP" in name:
            preprocess = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}
        about = {"model_cfg": config, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(about))
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
        size = model.visual.image_size
        size = size[0] if isinstance(size, tuple) else size
        transform = image_transform_v2(PreprocessCfg(size=size, **preprocess), is_train=False)
        tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
        with torch.no_grad():
            pixels = torch.stack([transform(p) for p in pictures()])
            z_image = unit(model.encode_image(pixels))
            z_text = unit(model.encode_text(tokenizer(TEXTS)))
            scale = model.logit_scale.exp().item()
            bias = model.logit_bias.item() if model.logit_bias is not None else 0.0
        del model, state
        gc.collect()
        compare(f"open_clip {name}", folder, z_image, z_text, scale * z_image @ z_text.T + bias)


def random_numbers(model: torch.nn.Module, size: int) -> None:
    """Factors by which every branch matters, and batch norms that have seen images, but not well.

    Without statistics of its own inputs a random tower gives all images one embedding.
    """
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for name, tensor in model.state_dict().items():
        if name.endswith("gamma"):
            tensor.normal_(0, 0.3)
    for module in norms:
        module.momentum = 1.0
        torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        torch.nn.init.normal_(module.bias, 0, 0.1)
    coarse = torch.nn.functional.interpolate(torch.rand(4, 3, 8, 8), size)
    with torch.no_grad():
        model.train().encode_image(0.5 * coarse + 0.5 * torch.rand(4, 3, size, size))
    model.eval()
    for module in norms:
        deviation = module.running_var.sqrt()
        module.running_mean += 0.2 * deviation * torch.randn_like(deviation)
        module.running_var *= 0.5 + torch.rand_like(deviation)


def transformers_model(kind: str) -> None:
    import transformers
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    from vlm.weights.vocabularies import clip_tokenizer
    from vlm.weights.writing_tokenizer import standalone

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        if kind == "CLIPModel":
            config = transformers.CLIPConfig()
            processor = CLIPImageProcessorPil()
        else:
            text = {"vocab_size": 49408, "max_position_embeddings": 64}
            config = transformers.SiglipConfig(text_config=text)
            processor = SiglipImageProcessorPil()
        model = getattr(transformers, kind)(config).eval()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        length = 77 if kind == "CLIPModel" else 64
        vocabulary = standalone(clip_tokenizer(length))
        (folder / "tokenizer.json").write_text(vocabulary.to_str())
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<end_of_text>",
                 "bos_token": "<start_of_text>", "eos_token": "<end_of_text>"}  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer(
            TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )["input_ids"]
        pixels = processor(pictures(), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            out = model(pixel_values=pixels, input_ids=tokens)
        del model
        gc.collect()
        compare(
            f"transformers {kind}", folder, out.image_embeds.numpy(), out.text_embeds.numpy(),
            out.logits_per_image.numpy(),
        )  # fmt: skip


def tipsv2() -> None:
    """TIPSv2 B/14 at its size. Of an empty text it makes no numbers, so there is none."""
    import make_huggingface
    import transformers

    torch.manual_seed(0)
    texts = [text for text in TEXTS if text]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model = transformers.Tipsv2Model(transformers.Tipsv2Config()).eval()
        model.save_pretrained(folder)
        tokenizer = make_huggingface.byte_pieces()
        processor = transformers.Tipsv2Processor(transformers.Tipsv2ImageProcessor(), tokenizer)
        processor.image_processor.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        options = {"padding": "max_length", "truncation": True, "max_length": 64}
        inputs = processor(images=pictures(), text=texts, return_tensors="pt", **options)
        with torch.no_grad():
            out = model(**inputs)
        del model
        gc.collect()
        compare(
            "transformers Tipsv2Model", folder, out.image_embeds.numpy(), out.text_embeds.numpy(),
            out.logits_per_image.numpy(), texts,
        )  # fmt: skip


def align() -> None:
    """ALIGN at its size, with batch norms as in training, on pixels of the published processor."""
    import make_huggingface
    import transformers

    torch.manual_seed(0)
    texts = [text for text in TEXTS if text]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model = transformers.AlignModel(transformers.AlignConfig()).eval()
        options = make_huggingface.ALIGN_PIXELS | {"size": {"height": 346, "width": 346}}
        processor = transformers.EfficientNetImageProcessorPil(**options | {"crop_size": 289})
        words = make_huggingface.align_vocabulary()
        tokenizer = transformers.BertTokenizer({word: i for i, word in enumerate(words)})
        inputs = transformers.AlignProcessor(processor, tokenizer)(
            images=pictures(), text=texts, truncation=True, return_tensors="pt"
        )
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        with torch.no_grad():
            for module in norms:
                module.momentum = 1.0
            model.train().get_image_features(pixel_values=inputs["pixel_values"])
            for module in norms:
                module.running_mean += 0.2 * torch.randn_like(module.running_mean)
                module.running_var += 0.2 * torch.rand_like(module.running_var)
            model.temperature.fill_(0.07)
            out = model.eval()(**inputs)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        gc.collect()
        compare(
            "transformers AlignModel", folder, out.image_embeds.numpy(), out.text_embeds.numpy(),
            out.logits_per_image.numpy(), texts,
        )  # fmt: skip


def lit() -> None:
    """LiT-B16B at its size: timm's and transformers' towers in a file of big_vision's layout."""
    from make_lit import embed_text, lit, towers, vocabulary

    from vlm.bundle import load

    torch.manual_seed(0)
    image = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    text = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 12, "intermediate_size": 3072,
            "max_position_embeddings": 512, "type_vocab_size": 2}  # fmt: skip
    vision, bert, head = towers(image, 3072, text, 768, image_head=True)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = pathlib.Path(folder) / "LiT-B16B.npz"
        np.savez(path, **lit(vision, bert, head, 4.39))
        words = vocabulary()
        words += [f"[unused{i}]" for i in range(text["vocab_size"] - len(words))]
        path.with_suffix(".txt").write_text("\n".join(words))
        # Pixels and ids by ours: the towers are what is compared here.
        bundle = load(path)
        pixels = bundle.preprocess(pictures()).transpose(0, 3, 1, 2)
        z_image = unit(vision(torch.from_numpy(pixels.copy())))
        z_text = embed_text(bert, head, torch.from_numpy(bundle.tokenizer(TEXTS)).long())
        del bundle
        compare("big_vision LiT-B16B", path, z_image, z_text, np.exp(4.39) * z_image @ z_text.T)


MASKED = ("hf_tipsv2", "hf_tipsv2_giant", "hf_align")  # whose padding is not looked at


def written_back() -> None:
    """Our golden folders, written by us, opened by transformers and open_clip."""
    import open_clip
    import transformers

    from vlm.bundle import load

    golden = ROOT / "tests" / "weights" / "golden"
    for name, form in (("hf_clip", "huggingface"), ("hf_siglip_wide", "huggingface"),
                       ("oc_quick", "huggingface"), ("oc_vit", "open_clip"),
                       ("oc_mean", "open_clip"), ("hf_clip", "open_clip"),
                       ("hf_tipsv2", "huggingface"),
                       ("hf_tipsv2_giant", "huggingface"),
                       ("hf_align", "huggingface")):  # fmt: skip
        bundle = load(golden / name)
        outputs = np.load(golden / name / "outputs.npz")
        pixels = torch.from_numpy(outputs["pixels"]).permute(0, 3, 1, 2)
        tokens = torch.from_numpy(outputs["tokens"]).long()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            folder = pathlib.Path(folder) / "out"
            bundle.save(folder, format=form)
            if form == "huggingface":
                model = transformers.AutoModel.from_pretrained(folder).eval()
                masked = {"attention_mask": (tokens != 0).long()} if name in MASKED else {}
                out = model(pixel_values=pixels, input_ids=tokens, **masked)
                z_image, z_text = out.image_embeds.numpy(), out.text_embeds.numpy()
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
                theirs = tokenizer(
                    outputs["texts"].tolist(), padding="max_length", truncation=True,
                    return_tensors="np",
                )["input_ids"]  # fmt: skip
            else:
                model = open_clip.create_model(f"local-dir:{folder}").eval()
                z_image, z_text = unit(model.encode_image(pixels)), unit(model.encode_text(tokens))
                theirs = open_clip.get_tokenizer(f"local-dir:{folder}")(outputs["texts"].tolist())
                theirs = theirs.numpy()
            ours_image = np.asarray(bundle.model.encode_image(outputs["pixels"]))
            ours_text = np.asarray(bundle.model.encode_text(outputs["tokens"]))
            same = np.array_equal(theirs, outputs["tokens"])
            print(
                f"{name} written as {form:12} image {np.abs(ours_image - z_image).max():.1e}  "
                f"text {np.abs(ours_text - z_text).max():.1e}  tokens equal: {same}",
                flush=True,
            )


def random_parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of which every one matters to the outputs."""
    noise = np.random.default_rng(len(name)).standard_normal(shape, np.float32)
    if name.endswith((".scale", ".var")):
        return 1 + np.abs(noise) * np.float32(0.2)
    if len(shape) == 4 and "stages" in name:  # convolutions, whose signal must not grow
        return noise * np.float32(np.prod(shape[:3]) ** -0.5)
    return noise * np.float32(0.03)


def towers_written() -> None:
    """Models made here at full size with towers of timm's and a ResNet, opened by open_clip."""
    import jax
    import open_clip

    from vlm.bundle import Bundle, load
    from vlm.config import ModelConfig, PreprocessConfig, ResNetConfig, TextConfig
    from vlm.inputs.preprocess import Preprocess
    from vlm.weights import timm
    from vlm.weights.files import Arrays
    from vlm.weights.instantiate import abstract_model
    from vlm.weights.rules import Rule, fill, flat_arrays, flat_shapes

    resnet = ResNetConfig()
    towers = {"RN50": resnet} | {name: timm.TOWERS[name] for name in TIMM_NAMES}
    golden = load(ROOT / "tests" / "weights" / "golden" / "oc_siglip")
    for name, vision in towers.items():
        siglip = "siglip" in name
        text = TextConfig(
            vocab_size=golden.config.text.vocab_size, context_length=12, width=64, depth=2, heads=4,
            mlp_dim=172, causal=not siglip, pool="last" if siglip else "argmax",
            projection="linear_bias" if siglip else "linear", norm_eps=1e-6 if siglip else 1e-5,
            activation="gelu_tanh" if siglip else "quick_gelu" if vision is resnet else "gelu",
        )  # fmt: skip
        embed_dim = vision.width if getattr(vision, "projection", "") == "none" else 1024
        config = ModelConfig(vision, text, embed_dim, init_bias=-9.5 if siglip else None)
        shapes = flat_shapes(skeleton := abstract_model(config, np.dtype(np.float32)))
        numbers = Arrays({n: random_parameter(n, shape) for n, shape in shapes.items()}, name)
        same = [Rule(n, n) for n in shapes]
        model = fill(skeleton, same, numbers, dtype=np.dtype(np.float32))
        resize = "squash" if siglip else "crop"
        preprocess = Preprocess(PreprocessConfig(image_size=vision.image_size, resize=resize))
        bundle = Bundle(model, preprocess, golden.tokenizer, name)
        z_image, z_text = bundle.encode_image(pictures()), bundle.encode_text(TEXTS)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            folder = pathlib.Path(folder) / "out"
            bundle.save(folder, format="open_clip")
            again = load(folder)
            pairs = zip(flat_arrays(model), flat_arrays(again.model), strict=True)
            equal = all(a == b and np.array_equal(x, y) for (a, x), (b, y) in pairs)
            jax.clear_caches()
            theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
            theirs.eval()
            tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
            pixels = torch.stack([transform(p) for p in pictures()])
            image = np.abs(unit(theirs.encode_image(pixels)) - z_image).max()
            words = np.abs(unit(theirs.encode_text(tokens)) - z_text).max()
            print(
                f"{name:34} written as open_clip: image {image:.1e}  text {words:.1e}  "
                f"read back bit-equal: {equal}",
                flush=True,
            )
        del model, bundle, again, theirs
        gc.collect()


TIMM_NAMES = ("vit_base_patch32_siglip_256", "vit_pe_core_base_patch16_224",
              "vit_base_patch16_siglip_224")  # fmt: skip

CASES = {
    "back": written_back,
    "towers": towers_written,
    "LiT-B16B": lit,
    "Tipsv2Model": tipsv2,
    "AlignModel": align,
    "CLIPModel": lambda: transformers_model("CLIPModel"),
    "SiglipModel": lambda: transformers_model("SiglipModel"),
    **{
        name: lambda name=name: open_clip_model(name)
        for name in (
            "ViT-B-32",
            "ViT-B-32-quickgelu",
            "ViT-M-16-alt",
            "coca_ViT-B-32",
            "RN50",
            "PE-Core-B-16",
            "MobileCLIP2-S0",
            "MobileCLIP2-S4",
            "MobileCLIP2-L-14",
        )
    },
}

if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        CASES[case]()
