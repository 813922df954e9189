"""Every architecture of the installed open_clip beside ours: exact, or refused and why.

    python tests/peers/architectures.py [--numbers] [NAME ...]

Without `--numbers` each model is made at full size on torch's meta device, which holds no numbers,
and every tensor must find its place in our model. With them it is made at full width but one block
deep, filled with random numbers, and both sides embed the same pixels and tokens.
"""

import functools
import gc
import sys
import warnings
from unittest import mock

import numpy as np
import open_clip
import timm
import torch
import transformers
from open_clip import hf_model
from open_clip import model as oc_model
from open_clip.coca_model import CoCa

from vlm.config import EncoderTextConfig, FastViTConfig, PreprocessConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.weights import encoders, fastvit, text_encoders
from vlm.weights import open_clip as ours
from vlm.weights import timm as timm_vit
from vlm.weights.files import Arrays
from vlm.weights.instantiate import abstract_model
from vlm.weights.resolution import at_image_size
from vlm.weights.rules import check, expand, fill, flat_shapes

# What the Hub's config.json of these encoders say, where it cannot be asked.
XLM = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "max_position_embeddings": 514}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
         "intermediate_size": 4096}  # fmt: skip
NLLB = {"vocab_size": 256206, "d_model": 1024, "encoder_attention_heads": 16,
        "decoder_attention_heads": 16, "scale_embedding": True}  # fmt: skip
ENCODERS = {
    "roberta-base": transformers.RobertaConfig(vocab_size=50265, **XLM),
    "xlm-roberta-base": transformers.XLMRobertaConfig(vocab_size=250002, **XLM),
    "xlm-roberta-large": transformers.XLMRobertaConfig(vocab_size=250002, **XLM, **LARGE),
    "facebook/nllb-200-distilled-600M": transformers.M2M100Config(
        encoder_layers=12, encoder_ffn_dim=4096, **NLLB
    ),
    "facebook/nllb-200-distilled-1.3B": transformers.M2M100Config(
        encoder_layers=24, encoder_ffn_dim=8192, **NLLB
    ),
    "bert-base-uncased": transformers.BertConfig(),
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract": transformers.BertConfig(),
    "google/mt5-base": transformers.MT5Config(d_model=768, num_heads=12, d_ff=2048, num_layers=12),
    "google/mt5-xl": transformers.MT5Config(d_model=2048, num_heads=32, d_ff=5120, num_layers=24),
    "Alibaba-NLP/gte-modernbert-base": transformers.ModernBertConfig(),
}


def shrunk(name: str) -> dict:
    """An architecture one block deep, its vocabulary small where it is a Hugging Face one's."""
    config = open_clip.get_model_config(name)
    for tower in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        layers = config.get(tower, {}).get("layers")
        if layers is not None:
            config[tower]["layers"] = [1] * 4 if isinstance(layers, list) else 1
    config["text_cfg"].setdefault("layers", 1)
    if "timm_model_name" not in config["vision_cfg"]:
        config["vision_cfg"].setdefault("layers", 1)
    return config


def shallow(create, name: str, **options):
    """timm's `create_model` with one block for each stage."""
    if name.startswith("convnext"):
        options["depths"] = (1, 1, 1, 1)
    elif name.startswith("fastvit"):
        options["layers"] = (1,) * (5 if name.endswith(("3", "4")) else 4)
    elif name.startswith("swin"):
        options["depths"] = (2, 2, 2, 2)
    elif name.startswith(("vit", "eva", "deit")):
        options["depth"] = 1
    return create(name, **options)


def encoder(name: str, *, deep: bool):
    if name not in ENCODERS:
        raise OSError(f"no config of {name} at hand")
    config = ENCODERS[name]
    if not deep:
        layers = {"encoder_layers": 1, "decoder_layers": 1, "num_layers": 1,
                  "num_hidden_layers": 1, "vocab_size": 1000}  # fmt: skip
        known = config.to_dict()
        if config.model_type == "modernbert":  # a global and a local block; small ids
            layers |= {"num_hidden_layers": 2, "layer_types": None, "bos_token_id": 1,
                       "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
                       "pad_token_id": 0}  # fmt: skip
        config = type(config)(**(known | {k: v for k, v in layers.items() if k in known}))
    else:
        config.decoder_layers = 1
    return config


def build(name: str, *, deep: bool) -> tuple[torch.nn.Module, dict]:
    config = open_clip.get_model_config(name) if deep else shrunk(name)
    options = dict(config)
    custom = options.pop("custom_text", False) or "hf_model_name" in options["text_cfg"]
    kind = oc_model.CustomTextCLIP if custom else oc_model.CLIP
    kind = CoCa if "multimodal_cfg" in options else kind
    if options["text_cfg"].get("hf_model_name"):
        options["text_cfg"] = options["text_cfg"] | {"hf_model_pretrained": False}
    create = timm.create_model
    replaced = create if deep else functools.partial(shallow, create)
    configs = functools.partial(encoder, deep=deep)
    with (
        mock.patch.object(timm, "create_model", replaced),
        mock.patch.object(hf_model.AutoConfig, "from_pretrained", configs),
    ):
        return kind(**options), config


def described(config: dict, tensors) -> tuple:
    """Our config, our rules, and the tensors as those rules take them."""
    where = tensors.where
    model = ours.model_config(config, tensors.shapes, where)
    if isinstance(model.vision, FastViTConfig):
        name = config["vision_cfg"]["timm_model_name"]
        tensors = fastvit.Fused(tensors, model.vision, name)
    tensors = timm_vit.with_biases(tensors)
    if isinstance(model.text, EncoderTextConfig):
        tensors = encoders.fold(tensors, model.text)
    elif text_encoders.reads(tensors.shapes):
        tensors = text_encoders.fold(tensors, model.text)
    return model, ours.rules(model, tensors.shapes), tensors


class Shapes:
    """Tensors that are shapes alone."""

    def __init__(self, shapes: dict, where: str):
        self.shapes, self.where = shapes, where


def fits(name: str) -> str:
    with torch.device("meta"):
        model, config = build(name, deep=True)
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    described_model, rules, tensors = described(config, Shapes(shapes, name))
    skeleton = flat_shapes(abstract_model(described_model, np.dtype(np.float32)))
    check(expand(rules, skeleton), skeleton, tensors, ours.ignored)
    return f"fits: {len(shapes):,} tensors, {sum(map(np.prod, shapes.values())) / 1e6:,.0f} M"


def agrees(name: str, size: int | None = None) -> str:
    """Compare embeddings, at another image `size` than that of the config if it is given."""
    torch.manual_seed(0)
    model, config = build(name, deep=False)
    model.eval()
    with torch.no_grad():
        for n, tensor in model.state_dict().items():
            if n.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and tensor.ndim == 1 and "logit" not in n:
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif tensor.is_floating_point() and not tensor.any():  # what begins at zero
                tensor.normal_(0, 0.02)
        vision, text = config["vision_cfg"], config["text_cfg"]
        stored = vision.get("image_size", 224)
        size = size or stored
        pixels = torch.randn(2, 3, size, size)
        length = text.get("context_length", 77)
        vocabulary = 1000 if text.get("hf_model_name") else text.get("vocab_size", 49408)
        tokens = torch.randint(3, vocabulary - 1, (2, length))
        end = 2 if text.get("hf_model_name") else text.get("eos_id", vocabulary - 1)
        tokens[0, length // 2], tokens[1, length - 1] = end, end
        pad = text.get("pad_id", 0)
        if hub := text.get("hf_model_name"):
            pad = ENCODERS[hub].pad_token_id
        tokens[0, length // 2 + 1 :] = pad
        image = torch.nn.functional.normalize(model.encode_image(pixels), dim=-1).numpy()
        words = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1).numpy()
        arrays = {n: t.numpy() for n, t in model.state_dict().items()}
    described_model, rules, tensors = described(config, Arrays(arrays, name))
    described_model, _ = at_image_size(described_model, PreprocessConfig(image_size=stored), size)
    dtype = np.dtype(np.float32)
    filled = fill(
        abstract_model(described_model, dtype), rules, tensors, dtype=dtype, ignored=ours.ignored
    )
    z_image = np.asarray(filled.encode_image(pixels.permute(0, 2, 3, 1).numpy()))
    z_text = np.asarray(filled.encode_text(tokens.numpy().astype(np.int32)))
    errors = np.abs(z_image - image).max(), np.abs(z_text - words).max()
    verdict = "exact" if max(errors) < 3e-6 else "DIFFERS"
    return f"{verdict}: image {errors[0]:.1e}, text {errors[1]:.1e}"


def main(names: list[str], look) -> dict[str, str]:
    """What was found, by architecture; printed with the number of its pretrained tags."""
    tags = [architecture for architecture, _ in open_clip.list_pretrained()]
    found, read = {}, 0
    for name in names or open_clip.list_models():
        try:
            found[name] = look(name)
            read += tags.count(name)
        except (CheckpointError, ConfigError) as error:
            found[name] = f"refused: {error}"
        except Exception as error:  # open_clip itself cannot make it here
            found[name] = f"not made by open_clip here: {type(error).__name__}: {error}"[:200]
        print(f"{name:32} {tags.count(name):3} tags  {found[name]}", flush=True)
        gc.collect()
    print(f"{read} of {sum(tags.count(name) for name in found)} pretrained tags")
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    arguments = [argument for argument in sys.argv[1:] if argument != "--numbers"]
    main(arguments, agrees if "--numbers" in sys.argv else fits)
