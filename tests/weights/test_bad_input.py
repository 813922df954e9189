"""Checkpoints that are not what they say: each is refused in one sentence that names the place."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from vlm.bundle import load
from vlm.errors import CheckpointError, ConfigError
from vlm.weights.files import SafetensorsFile, write_safetensors
from vlm.weights.registry import open_checkpoint
from vlm.weights.rules import flat_arrays

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def folder(tmp_path):
    def copy(name):
        return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return copy


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v["vision_config"].update(hidden_act="swish"),
            "vision_config.*'swish'.*quick_gelu",
        ),
        (lambda v: v.update(model_type="llama"), "model_type is 'llama'.*clip, siglip"),
        (lambda v: v.pop("model_type"), "model_type is None"),
        (lambda v: v["text_config"].update(hidden_size="24"), r"text_config\.hidden_size is '24'"),
        (lambda v: v["vision_config"].update(patch_size=[6, 6]), r"patch_size is \[6, 6\]"),
        (lambda v: v["vision_config"].update(num_channels=1), "1 channels"),
        (lambda v: v.update(vision_config=[1]), "vision_config is .*, not an object"),
        (lambda v: v["text_config"].update(num_attention_heads=5), "not a multiple of heads 5"),
        (lambda v: v["text_config"].update(num_hidden_layers=4), "missing from the file.*layers.3"),
        (lambda v: v["text_config"].update(num_hidden_layers=2), "without a place.*layers.2"),
        (lambda v: v.update(projection_dim=21), r"\(20, 24\) \(the model has \(21, 24\)\)"),
    ],
)
def test_huggingface_configurations(folder, change, message):
    path = folder("hf_clip")
    edit(path / "config.json", change)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("embed_dim"), "model_cfg has no 'embed_dim'"),
        (lambda m: m["vision_cfg"].update(layers=True), "vision_cfg.layers is True, not a whole"),
        (
            lambda m: m["vision_cfg"].update(qk_norm=True),
            "qk_norm True, which vlm does not support",
        ),
        (lambda m: m["vision_cfg"].update(novelty=3), "novelty 3, which vlm does not support"),
        (lambda m: m["vision_cfg"].update(act_kwargs={"x": 1}), "activation that vlm does not"),
        (lambda m: m["text_cfg"].update(hf_model_name="xlm-roberta-base"), "'xlm-roberta-base'"),
        (
            lambda m: m["text_cfg"].update(pool_type="none"),
            "pool_type is 'none': vlm",
        ),
        (lambda m: m["text_cfg"].update(tokenizer_kwargs={"x": 1}), "tokenizer_kwargs is"),
        (lambda m: m["vision_cfg"].update(timm_model_name="regnety_032"), "'regnety_032' is"),
        (lambda m: m["vision_cfg"].update(image_size=[28, 35]), "supports only squares"),
    ],
)
def test_open_clip_configurations(folder, change, message):
    path = folder("oc_vit")
    edit(path / "open_clip_config.json", lambda v: change(v["model_cfg"]))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "turns do_resize off"),
        ({"resample": 9}, "resample 9"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0"),
        ({"size": {"longest_edge": 30}}, "longest_edge"),
        ({"crop_size": {"height": 30, "width": 20}}, "not a square"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        (
            {"crop_size": 24, "size": 24},
            "image_size is 24 in the preprocessing and 30",
        ),
    ],
)
def test_processors(folder, change, message):
    path = folder("hf_clip")
    edit(path / "preprocessor_config.json", lambda v: v.update(change))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load(path)


def test_a_missing_shard_and_a_truncated_one(folder):
    path = folder("hf_siglip_wide")
    shard = path / "model-00002-of-00004.safetensors"
    if not shard.exists():
        shard = sorted(path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=rf"{shard.name} is truncated"):
        load(path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"there is no .*{shard.name}"):
        load(path)


def test_shards_of_a_pytorch_file(folder):
    """Read as the safetensors they were made of; a missing shard is named."""
    path = folder("hf_clip")
    whole = load(path)
    (path / "model.safetensors").unlink()
    shutil.copytree(GOLDEN / "hf_clip_bin", path, dirs_exist_ok=True)
    for (name, a), (_, b) in zip(
        flat_arrays(whole.model), flat_arrays(load(path).model), strict=True
    ):
        assert np.array_equal(a, b), name
    shard = path / "pytorch_model-00002-of-00002.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=rf"{shard.name} is no zip archive: it is truncated"):
        load(path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"there is no .*{shard.name}"):
        load(path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": null}'])
def test_an_index_that_lists_nothing(folder, text):
    path = folder("hf_siglip_wide")
    (path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json lists no shards: download it again"):
        load(path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "a/b", "..", "", 3, ["a"]])
def test_an_index_that_names_what_is_not_beside_it(folder, shard):
    path = folder("hf_siglip_wide")
    edit(path / "model.safetensors.index.json", lambda v: v["weight_map"].update(a=shard))
    with pytest.raises(CheckpointError, match=r"index\.json names the shard .*a file beside"):
        load(path)


def test_truncated_json(folder):
    path = folder("oc_vit")
    (path / "open_clip_config.json").write_text('{"model_cfg": {')
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json is not JSON"):
        load(path)


def test_damaged_safetensors_headers(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [("a", np.arange(6, dtype=np.float32))], {})
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for bad in (
        whole[8 : 8 + length].replace(b"F32", b"Q99"),
        whole[8 : 8 + length].replace(b"[6]", b"[7]"),
        whole[8 : 8 + length].replace(b"{", b"[", 1),
        b"\xff" * length,
    ):
        path.write_bytes(whole[:8] + bad + whole[8 + length :])
        with pytest.raises(CheckpointError, match="damaged header"):
            SafetensorsFile(path)


def safetensors(path, header, data=bytes(48)):
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)
    return path


def entry(begin, end, dtype="F32", shape=None):
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ENTRY = json.dumps(entry(0, 48))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 32), "b": entry(16, 48)}, "damaged header .*'a' and 'b' overlap"),
        ({"a": entry(0, 48), "b": entry(0, 48)}, "'a' and 'b' overlap"),
        ({"a": entry(0, 16), "b": entry(32, 48)}, "a hole before 'b'"),
        ({"a": entry(8, 48)}, "a hole before 'a'"),
        ({"a": entry(0, 40)}, "has 8 bytes after its last tensor"),
        ({"a": entry(0, 56)}, r"is truncated \("),
        (f'{{"a": {ENTRY}, "a": {ENTRY}}}', "'a' appears twice"),
        (
            '{"a": {"dtype": "F32", "dtype": "F32", "shape": [12], "data_offsets": [0, 48]}}',
            "twice",
        ),
        ({"a": entry(0, 48, "F8_E8M0", [48])}, "tensors of type F8_E8M0, which are quantized"),
        ({"a": entry(0, 48, "C64", [6])}, "tensors of type C64, .*not of real numbers"),
        ({"a": entry(0, 48, "F31")}, "unknown type 'F31'"),
        ({"a": entry(0, 48, ["F32"])}, "unknown type"),
        ({"a": entry(0, 48, shape=[-12])}, "not a whole number"),
        ({"a": entry(0, 48, shape=[True, 12])}, "not a whole number"),
        ({"a": entry(0, 48, shape=[12.0])}, "not a whole number"),
        ({"a": entry(0, 48, shape=[2**63, 2**63])}, "does not fill bytes 0 to 48"),
        ({"a": entry(0, 48, shape=12)}, "damaged header"),
        ({"a": {"dtype": "F32"}}, "damaged header"),
        ({"a": 5}, "damaged header"),
        ({"__metadata__": [1], "a": entry(0, 48)}, "damaged header"),
        ("[" * 100_000, "nested too deep"),
        ("[1, 2]", "damaged header"),
    ],
)
def test_safetensors_that_are_none(tmp_path, header, message):
    with pytest.raises(CheckpointError, match=message) as refusal:
        SafetensorsFile(safetensors(tmp_path / "x.safetensors", header))
    assert len(str(refusal.value)) < 400


def test_a_tensor_in_two_shards(folder):
    path = folder("hf_siglip_wide")
    first, second = sorted(path.glob("model-*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"has .*, which .*00001-of-\d+\.safetensors has too"):
        load(path)
    path = folder("hf_clip")
    shutil.copytree(GOLDEN / "hf_clip_bin", path, dirs_exist_ok=True)
    (path / "model.safetensors").unlink()
    first, second = sorted(path.glob("pytorch_model-*.bin"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"has .*, which .*00001-of-00002\.bin has too"):
        load(path)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.bool_])
def test_quantized_weights(folder, dtype):
    path = folder("oc_vit")
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    file = SafetensorsFile(path / "open_clip_model.safetensors")
    without(path, name, **{name: file.read(name).astype(dtype)})
    with pytest.raises(
        CheckpointError, match=f"{name}' as {np.dtype(dtype)}, as a quantized model"
    ):
        load(path)
    path = folder("oc_fastvit")
    name = TRUNK + "stem.0.conv_scale.conv.weight"
    file = SafetensorsFile(path / "open_clip_model.safetensors")
    without(path, name, **{name: file.read(name).astype(dtype)})
    with pytest.raises(
        CheckpointError, match=f"{name}' as {np.dtype(dtype)}, as a quantized model"
    ):
        load(path)


def test_a_missing_tower_is_named_and_the_list_is_short(folder):
    path = folder("oc_vit")
    file = SafetensorsFile(path / "open_clip_model.safetensors")
    text = [name for name in file.shapes if not name.startswith("visual.")]
    text = [name for name in text if not name.startswith("logit")]
    others = {f"classifier.{'x' * 300}.{n}": np.zeros(2, np.float32) for n in range(500)}
    without(path, *text, **others)
    with pytest.raises(CheckpointError, match=r"\(it has no text tower at all\)") as refusal:
        load(path)
    assert "and 480 more" in str(refusal.value)
    assert len(str(refusal.value)) < 7000


def test_written_safetensors_are_the_librarys(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file

    rng = np.random.default_rng(0)
    arrays = [("b", rng.standard_normal((3, 5)).astype(np.float16)), ("a", np.arange(4)),
              ("s", np.float32(3.5)), ("empty", np.zeros((0, 2), np.float32))]  # fmt: skip
    write_safetensors(tmp_path / "x.safetensors", arrays, {"format": "pt"})
    theirs = load_file(tmp_path / "x.safetensors")
    ours = SafetensorsFile(tmp_path / "x.safetensors")
    for name, array in arrays:
        assert np.array_equal(theirs[name], array)
        assert np.array_equal(ours.read(name), array)
    assert np.array_equal(ours.read("b", 1, 3), arrays[0][1][1:3])
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


MEMORY = """
import resource, sys
import numpy as np
from vlm.weights.instantiate import abstract_model

from vlm.weights.files import SafetensorsFile
from vlm.weights.rules import fill
from vlm.weights import huggingface
import jax, jax.numpy as jnp

jnp.zeros(1).block_until_ready()
values = {"model_type": "clip", "projection_dim": 256,
          "vision_config": {"hidden_size": 512, "intermediate_size": 2048,
                            "num_attention_heads": 8},
          "text_config": {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6,
                          "vocab_size": 200_000}}
config = huggingface.model_config(values, "here")
model = abstract_model(config, jnp.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = fill(model, huggingface.RULES["clip"], SafetensorsFile(sys.argv[1]), dtype=np.float32)
jax.block_until_ready(jax.tree.leaves(model))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_peak_memory_of_loading(tmp_path):
    """A checkpoint of n bytes loads in less than 1.3 n, also where one table is over half of it."""
    import jax.numpy as jnp

    from vlm.weights import huggingface
    from vlm.weights.instantiate import abstract_model
    from vlm.weights.rules import expand, flat_shapes

    values = {"model_type": "clip", "projection_dim": 256,
              "vision_config": {"hidden_size": 512, "intermediate_size": 2048,
                                "num_attention_heads": 8},
              "text_config": {"hidden_size": 384, "intermediate_size": 1536,
                              "num_attention_heads": 6, "vocab_size": 200_000}}  # fmt: skip
    model = abstract_model(huggingface.model_config(values, "here"), jnp.float32)
    shapes = {
        p.theirs: p.their_shape for p in expand(huggingface.RULES["clip"], flat_shapes(model))
    }
    path = tmp_path / "model.safetensors"
    write_safetensors(path, [(n, np.zeros(s, np.float32)) for n, s in shapes.items()], {})
    size = path.stat().st_size
    assert size > 2e8
    run = [sys.executable, "-c", MEMORY, str(path)]
    out = subprocess.run(run, capture_output=True, text=True, check=True)
    assert int(out.stdout) < 1.3 * size, f"{int(out.stdout) / size:.2f} n"


def without(path, *names, **others):
    """Write the weights in a folder again, without some tensors and with others instead."""
    path = path / "open_clip_model.safetensors"
    file = SafetensorsFile(path)
    arrays = {name: file.read(name) for name in file.shapes if name not in names} | others
    write_safetensors(path, arrays.items(), {})


TRUNK = "visual.trunk."


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stem.0.conv_scale.conv.weight", "every branch of its FastViT: .*conv_scale.* is missing"),
        ("stages.1.blocks.1.token_mixer.norm.identity.bias", "norm.identity.bias is missing"),
        ("stages.2.pos_emb.pos_enc.bias", "pos_enc.bias is missing"),
        ("stages.2.downsample.proj.0.small_conv.bn.running_var", "running_var is missing"),
        ("stages.2.blocks.0.layer_scale_1.gamma", "layer_scale_1.gamma is missing"),
        ("stages.2.blocks.0.norm.running_mean", "norm.running_mean is missing"),
        ("final_conv.se.fc2.bias", "1 parameter missing from the file: .*se.fc2.bias"),
        ("head.fc.weight", "the weights are not those of timm's fastvit_mci0"),
    ],
)
def test_a_fastvit_without_a_branch(folder, name, message):
    path = folder("oc_fastvit")
    without(path, TRUNK + name)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_a_fastvit_with_other_branches(folder):
    path = folder("oc_fastvit")
    norm = TRUNK + "stem.0.identity.weight"
    without(path, **{norm: np.ones(8, np.float32)})
    with pytest.raises(CheckpointError, match=r"without a place .*stem\.0\.identity"):
        load(path)
    scale = TRUNK + "stem.0.conv_scale.conv.weight"
    without(path, norm, **{scale: np.ones((8, 3, 3, 3), np.float32)})
    with pytest.raises(CheckpointError, match=r"has the shape \(8, 3, 3, 3\) and not \(8, 3, 1"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timm_model_name": "fastvit_sa12"}, "'fastvit_sa12' is not one that vlm reads"),
        ({"timm_model_name": "vit_base_mci_224"}, "'vit_base_mci_224' has timm_pool 'avg'"),
        ({"timm_pool": "max"}, "timm_pool 'max'.*the mean of the image"),
        ({"timm_proj": "linear"}, "timm_proj 'linear'.*no extra projection"),
    ],
)
def test_towers_beside_fastvit(folder, change, message):
    path = folder("oc_fastvit")
    edit(path / "open_clip_config.json", lambda v: v["model_cfg"]["vision_cfg"].update(change))
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_a_fastvit_fused_by_timm_is_the_same_model(folder):
    """Blocks that are one convolution already, under timm's name for it, are read as they are."""
    whole = load(path := folder("oc_fastvit"))
    file = open_checkpoint(epath.Path(path)).tensors
    kept = {n: file.read(n).astype(np.float32) for n in file.shapes if "mlp" not in n}
    kept = {n: array for n, array in kept.items() if "stem" in n or "final_conv" in n}
    old = SafetensorsFile(path / "open_clip_model.safetensors").shapes
    gone = [n for n in old if n.startswith((TRUNK + "stem", TRUNK + "final_conv"))]
    without(path, *gone, **kept)
    for (name, a), (_, b) in zip(
        flat_arrays(whole.model), flat_arrays(load(path).model), strict=True
    ):
        assert np.array_equal(a, b), name
