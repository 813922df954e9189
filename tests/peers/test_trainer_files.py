"""Checkpoints of open_clip's own trainer and of torch.save, opened by their architecture."""

import jax.numpy as jnp
import numpy as np
import pytest

from vlm.bundle import load

pytestmark = pytest.mark.peers
TEXTS = ["a photo of a cat", "two dogs"]


@pytest.mark.parametrize("kind", ["state", "trainer", "compiled"])
def test_a_checkpoint_is_open_clips(kind, tmp_path):
    open_clip, torch = pytest.importorskip("open_clip"), pytest.importorskip("torch")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt").eval()
    state = model.state_dict()
    if kind == "trainer":  # as open_clip_train.main saves it under DistributedDataParallel
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model.encode_text(open_clip.tokenize(TEXTS)).sum().backward()
        optimizer.step()
        state = {
            "epoch": 3,
            "name": "run",
            "state_dict": {f"module.{name}": x for name, x in model.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "scaler": torch.amp.GradScaler("cpu").state_dict(),
        }
    elif kind == "compiled":
        state = {f"_orig_mod.{name}": x for name, x in state.items()}
    torch.save(state, tmp_path / "epoch_3.pt")
    bundle = load(tmp_path / "epoch_3.pt", architecture="ViT-S-32-alt")
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        z_image = model.encode_image(pixels, normalize=True).numpy()
        tokens = open_clip.get_tokenizer("ViT-S-32-alt")(TEXTS)
        z_text = model.encode_text(tokens, normalize=True).numpy()
    ours = bundle.model.encode_image(jnp.asarray(pixels.permute(0, 2, 3, 1).numpy()))
    ours = np.asarray(ours)
    assert np.abs(ours - z_image).max() < 3e-6
    assert np.abs(bundle.encode_text(TEXTS) - z_text).max() < 3e-6
