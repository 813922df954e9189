"""Encoding speed and time to the first label, ViT-B/32 on this CPU, beside open_clip in one run.

Run with the extra `peers` installed beside vlm: python tests/peers/encode.py
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
TEXTS = [f"a photo of a {word}, a kind of thing" for word in ("cat", "dog", "pizza", "car") * 8]

FIRST_LABEL = {
    "vlm": """
import sys; sys.path.insert(0, {root!r})
import numpy as np
from vlm.bundle import load
model = load({folder!r})
image = np.load({folder!r} + "/image.npy")
logits = model.encode_image(image) @ model.encode_text(["a cat", "a dog"]).T
print(logits.argmax())
""",
    "open_clip": """
import numpy as np, torch, open_clip
from PIL import Image
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + {folder!r})
tokenizer = open_clip.get_tokenizer("local-dir:" + {folder!r})
image = preprocess(Image.fromarray(np.load({folder!r} + "/image.npy")))[None]
with torch.no_grad():
    z = model.eval().encode_image(image, normalize=True)
    t = model.encode_text(tokenizer(["a cat", "a dog"]), normalize=True)
print((z @ t.T).argmax().item())
""",
}


def main(rounds: int = 5) -> None:
    import open_clip
    import safetensors.torch
    import torch

    from vlm.bundle import load
    from vlm.models.text import shortened

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        theirs = open_clip.create_model("ViT-B-32").eval()
        about = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": {}}
        (path / "open_clip_config.json").write_text(json.dumps(about))
        safetensors.torch.save_file(theirs.state_dict(), path / "open_clip_model.safetensors")
        rng = np.random.default_rng(0)
        np.save(path / "image.npy", rng.integers(0, 256, (300, 400, 3)).astype(np.uint8))
        ours = load(path)
        pixels = rng.integers(0, 256, (32, 224, 224, 3)).astype(np.uint8)
        normal = (
            torch.from_numpy(ours.preprocess.normalize(pixels)).permute(0, 3, 1, 2).contiguous()
        )
        tokens = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
        rows = np.asarray(ours.tokenizer(TEXTS))

        def their_image():
            with torch.no_grad():
                return theirs.encode_image(normal, normalize=True)

        def their_text():
            with torch.no_grad():
                return theirs.encode_text(tokens, normalize=True)

        def our_image():
            return np.asarray(ours._image_program(ours._split[1], pixels))

        def our_text():
            return np.asarray(ours._text_program(ours._split[1], shortened(rows, ours.config.text)))

        seconds = {f: [] for f in (our_image, their_image, our_text, their_text)}
        for number in range(rounds + 1):
            for run, times in seconds.items():
                start = time.perf_counter()
                run()
                if number:
                    times.append(time.perf_counter() - start)
        best = {run.__name__: min(times) for run, times in seconds.items()}
        for what in ("image", "text"):
            a, b = best[f"our_{what}"], best[f"their_{what}"]
            print(
                f"{what}: {32 / a:.1f}/s, open_clip {32 / b:.1f}/s, ratio {b / a:.2f}", flush=True
            )

        first: dict[str, list[float]] = {"vlm": [], "vlm, nothing compiled": [], "open_clip": []}
        for number in range(3):
            for name, times in first.items():
                program = FIRST_LABEL[name.partition(",")[0]]
                cache = path / (f"empty{number}" if "nothing" in name else "cache")
                start = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-c", program.format(root=str(ROOT), folder=folder)],
                    env=os.environ | {"VLM_CACHE": str(cache)},
                    check=True,
                    capture_output=True,
                )
                times.append(time.perf_counter() - start)
        theirs_first = min(first.pop("open_clip")[1:])
        for name, times in first.items():
            ours_first = min(times[1:])
            print(
                f"start to first label, {name}: {ours_first:.1f} s, open_clip {theirs_first:.1f} "
                f"s, ratio {ours_first / theirs_first:.2f}"
            )


if __name__ == "__main__":
    main()
