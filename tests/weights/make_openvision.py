"""Writes `golden/openvision_jax`: a small OpenVision in its authors' form for JAX, and its outputs.

The reference is their own code, whose checkpoint is written as theirs are: by Orbax, parameters and
optimizer together. Needs the extra `peers`, ml_collections, einops, and a checkout of
https://github.com/UCSC-VLAA/OpenVision: python tests/weights/make_openvision.py CHECKOUT
"""

import json
import pathlib
import shutil
import sys
import types

import flax.training.checkpoints  # noqa: F401  (before `tensorflow` is a stand-in, below)
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import torch
import transformers
from PIL import Image
from torchvision.transforms import v2

GOLDEN = pathlib.Path(__file__).parent / "golden" / "openvision_jax"
SIZE, PATCH, LENGTH, WIDTH, TEXT_WIDTH, EMBED = 24, 6, 10, 24, 16, 12
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEXTS = ["A photo of a cat", "two Dogs [SEP] running", "  café\n", "", "cat dog " * 9]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "two", "dog",
         "##s", "running", "cafe"]  # fmt: skip
BLOCK = {"depth": 2, "mlp_dim": 32, "num_heads": 2, "use_dense_general": False}


def their_model(checkout: str):
    """Their two towers, with the caption decoder that they are trained beside."""
    sys.path.insert(0, checkout)
    # What their helpers import and no tower uses; and what JAX has since given another name.
    for name in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["tensorflow"].io = sys.modules["tensorflow.io"]
    sys.modules["tensorflow.io"].gfile = sys.modules["tensorflow.io.gfile"]
    moved = types.ModuleType("jax.experimental.shard_map")
    moved.shard_map = jax.shard_map
    sys.modules["jax.experimental.shard_map"] = moved
    from src.models import two_towers

    for name in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile"):
        del sys.modules[name]  # others ask whether it is installed
    return two_towers.Model(
        out_dim=(EMBED, EMBED),
        image_model="vit",
        image={"width": WIDTH, "patch_size": (PATCH, PATCH), "posemb": "sincos2d",
               "emb_head_bias": False, "pool_type": "gap", "output_tokens": True, **BLOCK},
        text_model="text_transformer",
        text={"width": TEXT_WIDTH, "vocab_size": len(WORDS), "pool_type": "last",
              "output_tokens": True, **BLOCK},
        text_decoder="none",
        temperature_init=1 / 0.07,
    )  # fmt: skip


def config() -> dict:
    """As their converter writes it beside the weights."""
    return {
        "model_cfg": {
            "embed_dim": EMBED,
            "vision_cfg": {"image_size": SIZE, "layers": 2, "width": WIDTH, "patch_size": PATCH,
                           "head_width": WIDTH // 2, "mlp_ratio": 32 / WIDTH, "no_ln_pre": True,
                           "pool_type": "avg", "final_ln_after_pool": True},
            "text_cfg": {"context_length": LENGTH, "vocab_size": len(WORDS), "width": TEXT_WIDTH,
                         "heads": 2, "layers": 2, "mlp_ratio": 2.0, "no_causal_mask": True,
                         "pool_type": "last", "act_kwargs": {"approximate": "tanh"},
                         "hf_tokenizer_name": "bert-base-uncased",
                         "tokenizer_kwargs": {"strip_sep_token": True}},
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bilinear"},
    }  # fmt: skip


def vocabulary() -> transformers.BertTokenizer:
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def save(params: dict, folder: pathlib.Path) -> None:
    """As their training does: the newest step of a manager, with Adam's state in bfloat16."""
    state = {"params": params, "opt": optax.adam(1e-3, mu_dtype=jnp.bfloat16).init(params)}
    options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        manager.save(3, args=ocp.args.StandardSave(state))
    for note in folder.rglob("commit_success.txt"):
        note.unlink()  # it names the folder's place on this machine, and nobody reads it


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    model, rng = their_model(sys.argv[1]), np.random.default_rng(41)
    zeros = jnp.zeros((1, SIZE, SIZE, 3)), jnp.zeros((1, LENGTH), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *zeros))["params"]
    shapes = jax.tree.map(lambda x: getattr(x, "value", x), shapes,
                          is_leaf=lambda x: hasattr(x, "value"))  # fmt: skip
    params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.3, x.shape)), shapes)
    params["t"] = np.float32([2.1])
    # The decoder is not asked for above: of its parameters, a few that must be left alone.
    params["txt_decoder"] = {"head": {"kernel": np.float32(rng.normal(size=(4, 3)))}}
    save(params, GOLDEN / "jax_orbax_weight" / "checkpoint.npz")
    (GOLDEN / "open_clip_config.json").write_text(json.dumps(config(), indent=1))
    words = vocabulary()
    words.save_pretrained(GOLDEN)

    raw = [rng.integers(0, 256, size, np.uint8) for size in ((30, 41, 3), (24, 24, 3), (50, 26, 3))]
    see = v2.Compose([v2.Resize(SIZE, v2.InterpolationMode.BILINEAR), v2.CenterCrop(SIZE),
                      v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                      v2.Normalize(MEAN, STD)])  # fmt: skip
    pixels = np.stack([see(Image.fromarray(x)).numpy().transpose(1, 2, 0) for x in raw])
    tokens = words(TEXTS, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
    tokens = np.array(tokens)
    tokens[tokens == WORDS.index("[SEP]")] = 0  # strip_sep_token
    del params["txt_decoder"]
    z_image, z_text, out = model.apply({"params": params}, pixels, tokens)
    logits = np.asarray(out["t"]) * np.asarray(z_image) @ np.asarray(z_text).T
    np.savez_compressed(
        GOLDEN / "outputs.npz", pixels=pixels, tokens=tokens, z_image=z_image, z_text=z_text,
        logits=logits, texts=np.array(TEXTS), **{f"image/{i}": x for i, x in enumerate(raw)},
    )  # fmt: skip


if __name__ == "__main__":
    main()
