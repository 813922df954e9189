"""`vlm serve` beside infinity: one CLIP ViT-B/32 from disk, the same clients, in turns.

    pip install -e ".[peers,serve]"
    python tests/peers/serving_speed.py --infinity infinity_emb

infinity 0.0.77 needs transformers 4 and huggingface_hub below 1, so its command may be
one of another environment. Both compute in float32, in batches of at most 32, and must answer
with the same embeddings: an older infinity reads an image's data as text.
"""

import argparse
import asyncio
import base64
import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "serving")]

from load import CLIENTS, Client, closed_loop, image_bodies, report, served, text_bodies  # noqa: E402


def save_model(folder: pathlib.Path) -> None:
    """A CLIP of transformers with random weights, with all that its processor needs."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

    torch.manual_seed(0)
    gelu = {"hidden_act": "gelu"}
    CLIPModel(CLIPConfig(text_config=gelu, vision_config=gelu)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    start, end = "<start_of_text>", "<end_of_text>"  # as the vocabulary of open_clip names them
    vocabulary = str(ROOT / "vlm" / "weights" / "clip" / "tokenizer.json")
    CLIPTokenizerFast(
        tokenizer_file=vocabulary,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=end,
        model_max_length=77,
    ).save_pretrained(folder)


class Infinity:
    """infinity's server in a process of its own."""

    def __init__(self, command: str, model: pathlib.Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = f"v2 --model-id {model} --engine torch --device cpu --dtype float32"
        line = f"{command} {options} --port {self.port} --batch-size 32"
        quiet = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "INFINITY_BETTERTRANSFORMER": "0"}
        self._process = subprocess.Popen(
            shlex.split(line),
            env=os.environ | quiet,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while True:
            assert self._process.poll() is None, "infinity ended before it served"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.5)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)


def embedding(port: int, path: str, body: bytes) -> np.ndarray:
    """What a server answers to one request, of unit norm."""
    status, content = asyncio.run(Client(port).post(body, path))
    assert status == 200, content
    (item,) = json.loads(content)["data"]
    z = np.frombuffer(base64.b64decode(item["embedding"]), np.float32)
    return z / np.linalg.norm(z)


def bodies_for_infinity(bodies: list[bytes], model: pathlib.Path, modality: str) -> list[bytes]:
    """The same requests in infinity's form."""
    return [
        json.dumps({**json.loads(body), "model": str(model), "modality": modality}).encode()
        for body in bodies
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--infinity", default="infinity_emb", help="its command")
    parser.add_argument("--model", type=pathlib.Path, help="a CLIP of transformers on disk")
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            model = pathlib.Path(folder)
            save_model(model)
        loads = {"image": image_bodies(), "text": text_bodies(8)}
        infinity = Infinity(args.infinity, model)
        found: dict[tuple[str, str], list[float]] = {}
        with served("--model", model) as (port, _):
            for tower, bodies in loads.items():
                theirs = bodies_for_infinity(bodies, model, tower)
                z = embedding(port, "/v1/embeddings", bodies[0])
                difference = np.abs(z - embedding(infinity.port, "/embeddings", theirs[0])).max()
                assert difference < 1e-3, f"{tower}s differ by {difference:.1e}"
                for _ in range(args.rounds):
                    for name, at, sent, path in (
                        ("vlm", port, bodies, "/v1/embeddings"),
                        ("infinity", infinity.port, theirs, "/embeddings"),
                    ):
                        asyncio.run(closed_loop(at, sent, 1, CLIENTS, path))
                        figures = asyncio.run(closed_loop(at, sent, args.seconds, CLIENTS, path))
                        report(f"{name}, {tower}", figures)
                        found.setdefault((name, tower), []).append(figures["per_second"])
        infinity.stop()
    for tower in loads:
        ours, theirs = max(found["vlm", tower]), max(found["infinity", tower])
        print(f"{tower}s: vlm {ours:.1f}/s, infinity {theirs:.1f}/s: {ours / theirs:.2f}x")


if __name__ == "__main__":
    main()
