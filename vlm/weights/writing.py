"""A bundle as a folder that transformers or open_clip opens, with the same outputs.

What a format cannot say about a model is an error that names it: nothing is written then.
"""

import json
import string
import uuid
from typing import Any, Literal

import tokenizers
from etils import epath
from tokenizers import Regex, normalizers, processors

from vlm.config import ModelConfig, PreprocessConfig, TextConfig, VisionConfig
from vlm.errors import CheckpointError
from vlm.models.dual_encoder import DualEncoder
from vlm.paths import as_path
from vlm.preprocess import Preprocess
from vlm.tokenizer import Tokenizer
from vlm.weights import huggingface, open_clip
from vlm.weights.files import write_safetensors
from vlm.weights.rules import write

Format = Literal["huggingface", "open_clip"]


def write_folder(
    folder: epath.PathLike,
    form: Format,
    model: DualEncoder,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
) -> None:
    """Write the model, its preprocessing and its tokenizer in a public format.

    Raises:
        CheckpointError: the folder exists already, or the format has no place for something.
    """
    folder = as_path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: give the path of a new folder")
    writer = {"huggingface": _huggingface, "open_clip": _open_clip}[form]
    new = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.new"
    new.mkdir(parents=True)
    try:
        writer(new, model, preprocess, tokenizer)
        new.rename(folder)
    finally:
        if new.exists():
            new.rmtree()


# ------------------------------------------------------------------------------ transformers


def _huggingface(folder, model: DualEncoder, preprocess: Preprocess, tokenizer: Tokenizer) -> None:
    values, family = huggingface_config(model.config, tokenizer)
    _dump(folder / "config.json", values)
    _dump(folder / "preprocessor_config.json", _huggingface_preprocess(preprocess.config, family))
    _tokenizer_files(folder, tokenizer)
    tensors = write(model, huggingface.RULES[family])
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})


def huggingface_config(config: ModelConfig, tokenizer: Tokenizer) -> tuple[dict[str, Any], str]:
    """The `config.json` of a model, and its family.

    Raises:
        CheckpointError: lists all that transformers' CLIPModel and SiglipModel do not have.
    """
    vision, text = config.vision, config.text
    clip = vision.pool == "class"
    common = {"stem": "linear", "norm_pooled": False, "layer_scale": False, "pool_heads": None}
    if clip:
        wanted = (
            common | {"pre_norm": True, "patch_bias": False, "projection": "linear"},
            {"causal": True, "projection": "linear", "layer_scale": False, "pad_id": None},
        )
    else:
        wanted = (
            common
            | {"pool": "map", "pre_norm": False, "patch_bias": True, "projection": "none"}
            | {"class_token": False},
            {"causal": False, "pool": "last", "projection": "linear_bias", "layer_scale": False}
            | {"pad_id": None},
        )
    _check("transformers", config, *wanted)
    if clip and text.pool not in ("end", "argmax"):
        _refuse("transformers", [f"text.pool {text.pool!r} (end or argmax)"])
    if not clip and config.init_bias is None:
        _refuse("transformers", ["no logit_bias (SiglipModel has one)"])
    if clip and config.init_bias is not None:
        _refuse("transformers", ["a logit_bias (CLIPModel has none)"])
    rules = tokenizer.config
    ends = {"bos_token_id": rules.bos_id, "eos_token_id": rules.eos_id}
    text_values = _huggingface_tower(text) | {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "pad_token_id": rules.pad_id,
        **ends,
    }
    if clip:
        text_values["eos_token_id"] = 2 if text.pool == "argmax" else text.end_id
        text_values["projection_dim"] = config.embed_dim
    else:
        text_values["projection_size"] = config.embed_dim
    vision_values = _huggingface_tower(vision) | {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    family = "clip" if clip else "siglip"
    values = {
        "architectures": ["CLIPModel" if clip else "SiglipModel"],
        "model_type": family,
        "dtype": "float32",
        "text_config": text_values | {"model_type": f"{family}_text_model"},
        "vision_config": vision_values | {"model_type": f"{family}_vision_model"},
    }
    if clip:
        values["projection_dim"] = config.embed_dim
    return values, family


def _huggingface_tower(c: VisionConfig | TextConfig) -> dict[str, Any]:
    names = {
        ours: theirs for theirs, ours in huggingface.ACTIVATIONS.items() if theirs != "gelu_new"
    }
    return {
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_dim,
        "hidden_act": names[c.activation],
        "layer_norm_eps": c.norm_eps,
    }


def _huggingface_preprocess(c: PreprocessConfig, family: str) -> dict[str, Any]:
    name = "CLIPImageProcessor" if family == "clip" else "SiglipImageProcessor"
    kernels = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
    square = {"height": c.image_size, "width": c.image_size}
    values = {
        "image_processor_type": name + ("Fast" if c.backend == "tensor" else ""),
        "do_resize": True,
        "resample": kernels[c.kernel],
        "size": square,
        "do_center_crop": c.resize == "crop",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(c.mean),
        "image_std": list(c.std),
        "do_convert_rgb": True,
    }
    if c.resize == "crop":
        if family != "clip":
            _refuse("transformers", ["centre crops with SiglipModel, whose processor squashes"])
        values |= {"size": {"shortest_edge": c.short_side or c.image_size}, "crop_size": square}
    return values


# --------------------------------------------------------------------------------- open_clip


def _open_clip(folder, model: DualEncoder, preprocess: Preprocess, tokenizer: Tokenizer) -> None:
    values = open_clip_config(model.config, tokenizer)
    p = preprocess.config
    if p.backend != "pillow":
        _refuse("open_clip", ["the tensor backend of preprocessing (pillow)"])
    if p.kernel == "lanczos" or p.short_side is not None:
        _refuse("open_clip", [f"preprocessing by {p.kernel} from short side {p.short_side}"])
    description = {
        "model_cfg": values,
        "preprocess_cfg": {
            "size": p.image_size,
            "mode": "RGB",
            "mean": list(p.mean),
            "std": list(p.std),
            "interpolation": p.kernel,
            "resize_mode": "shortest" if p.resize == "crop" else "squash",
        },
    }
    _dump(folder / "open_clip_config.json", description)
    if values["text_cfg"].get("hf_tokenizer_name"):
        _tokenizer_files(folder, tokenizer)
    shapes = {"text.token_embedding.weight": (), "logit_scale": ()}
    tensors = write(model, open_clip.rules(model.config, shapes))
    write_safetensors(folder / "open_clip_model.safetensors", tensors, {"format": "pt"})


def open_clip_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The `model_cfg` of a model with open_clip's own towers.

    Raises:
        CheckpointError: lists all that those towers do not have.
    """
    vision, text = config.vision, config.text
    _check(
        "open_clip",
        config,
        {"stem": "linear", "patch_bias": False, "projection": "linear"},
        {},
    )
    faults = []
    if vision.pool not in ("class", "mean") or not (vision.class_token or vision.pool == "class"):
        faults.append(f"vision.pool {vision.pool!r} (class, or mean beside a class token)")
    if text.pool not in ("end", "argmax", "first", "last"):
        faults.append(f"text.pool {text.pool!r} (end, argmax, first or last)")
    if text.pad_id is not None:
        faults.append("a mask over padding in the text tower")
    quick = [c.activation == "quick_gelu" for c in (vision, text)]
    if quick[0] != quick[1]:
        faults.append("quick_gelu in one tower alone")
    if vision.width % vision.heads:
        faults.append(f"vision.heads {vision.heads}")
    if faults:
        _refuse("open_clip", faults)
    pools = {"argmax": "argmax", "end": "eos", "first": "first", "last": "last"}
    values: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.width // vision.heads,
            "no_ln_pre": not vision.pre_norm,
            "pool_type": {"class": "tok", "mean": "avg"}[vision.pool],
            "final_ln_after_pool": vision.norm_pooled,
            **_open_clip_tower(vision, "vision"),
        },
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "heads": text.heads,
            "no_causal_mask": not text.causal,
            "pool_type": pools[text.pool],
            "proj_bias": text.projection == "linear_bias",
            "proj_type": "none" if text.projection == "none" else "linear",
            **_open_clip_tower(text, "text"),
            **_open_clip_tokenizer(tokenizer),
        },
    }
    if text.pool == "end":
        values["text_cfg"]["eos_id"] = text.end_id
    if any(quick):
        values["quick_gelu"] = True
    if config.init_bias is not None:
        values["init_logit_bias"] = config.init_bias
    return values


def _open_clip_tower(c: VisionConfig | TextConfig, name: str) -> dict[str, Any]:
    ratio = c.mlp_dim / c.width
    for digits in range(1, 18):  # open_clip takes a ratio and truncates: the shortest that fits
        rounded = round(ratio + 0.5 / c.width, digits)
        if int(c.width * rounded) == c.mlp_dim:
            break
    else:
        _refuse("open_clip", [f"{name}.mlp_dim {c.mlp_dim}, which no ratio of {c.width} gives"])
    values = {"width": c.width, "layers": c.depth, "mlp_ratio": rounded}
    if int(c.width * 4.0) == c.mlp_dim:
        values["mlp_ratio"] = 4.0
    if c.norm_eps != 1e-5:
        values["norm_kwargs"] = {"eps": c.norm_eps}
    if c.activation == "gelu_tanh":
        values["act_kwargs"] = {"approximate": "tanh"}
    if c.layer_scale:
        values["ls_init_value"] = 1e-4
    return values


def _open_clip_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Nothing for CLIP's own vocabulary; open_clip reads others from the folder."""
    rules = tokenizer.config
    clean = {ours: theirs for theirs, ours in CLEAN.items()}.get(rules.clean)
    if rules.bos_id == 49406 and rules.eos_id == 49407 and tokenizer.vocab_size == 49408 and clean:
        return {} if clean == "lower" else {"tokenizer_kwargs": {"clean": clean}}
    # open_clip always cleans; "whitespace" is the least it does.
    return {
        "hf_tokenizer_name": "tokenizer.json of this folder",
        "tokenizer_kwargs": {"clean": clean or "whitespace"},
    }


CLEAN = {"lower": "clip", "whitespace": "clip_cased", "canonicalize": "clip_canonical"}


# ------------------------------------------------------------------------------------ shared


def standalone(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The vocabulary with our rules inside: cleaning as normalisation, and the special tokens.

    The repair of mojibake and HTML entities has no form there, as in transformers' own CLIP.
    """
    rules, vocabulary = tokenizer.config, tokenizer.vocabulary
    steps = []
    if rules.clean != "none":
        steps = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if rules.clean in ("siglip", "clip_canonical"):
        marks = "".join("\\" + mark for mark in string.punctuation)
        steps = [normalizers.Replace(Regex(f"[{marks}]"), ""), *steps]
    if rules.lowercase or rules.clean in ("clip", "siglip", "clip_canonical"):
        steps.append(normalizers.Lowercase())
    if rules.clean == "clip":
        steps.insert(0, normalizers.NFC())
    if steps:
        if vocabulary.normalizer is not None:
            steps.append(vocabulary.normalizer)
        vocabulary.normalizer = normalizers.Sequence(steps)
    names = {i: vocabulary.id_to_token(i) for i in (rules.bos_id, rules.eos_id) if i is not None}
    row = [names.get(rules.bos_id), "$A", names.get(rules.eos_id)]
    vocabulary.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in row if part),
        special_tokens=[(name, i) for i, name in names.items()],
    )
    return vocabulary


def _tokenizer_files(folder: epath.Path, tokenizer: Tokenizer) -> None:
    """`tokenizer.json` that does by itself what our rules do, and its `tokenizer_config.json`."""
    rules = tokenizer.config
    vocabulary = standalone(tokenizer)
    (folder / "tokenizer.json").write_text(vocabulary.to_str(pretty=True))
    names = {"bos_token": rules.bos_id, "eos_token": rules.eos_id, "pad_token": rules.pad_id}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": rules.context_length,
        "padding_side": rules.pad_side,
        **{name: vocabulary.id_to_token(i) for name, i in names.items() if i is not None},
    }
    _dump(folder / "tokenizer_config.json", about)


def _check(form: str, config: ModelConfig, vision: dict[str, Any], text: dict[str, Any]) -> None:
    found = [
        f"{name}.{field} {getattr(tower, field)!r} ({value!r})"
        for name, tower, fields in (("vision", config.vision, vision), ("text", config.text, text))
        for field, value in fields.items()
        if getattr(tower, field) != value
    ]
    if found:
        _refuse(form, found)


def _refuse(form: str, found: list[str]) -> None:
    raise CheckpointError(
        f"{form} has no place for {', '.join(found)}: save the model as a vlm bundle instead"
    )


def _dump(path: epath.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
