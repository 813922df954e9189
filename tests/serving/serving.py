"""A small model, an index of drawn pictures, and a real server of both on a loopback port."""

import base64
import contextlib
import dataclasses
import io
import json
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import uvicorn
from flax import nnx
from PIL import Image

from vlm.bundle import Bundle
from vlm.config import (
    ModelConfig,
    PreprocessConfig,
    TextConfig,
    ViTConfig,
)
from vlm.heads.retrieval import RetrievalIndex
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import train_bpe
from vlm.models.dual_encoder import DualEncoder
from vlm.serving.app import create_app
from vlm.serving.server import bind, uvicorn_config

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 70, 220)}
CONFIG = ModelConfig(
    vision=ViTConfig(
        image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=16,
        pool="mean", projection="linear",
    ),
    text=TextConfig(
        vocab_size=300, context_length=40, width=16, depth=1, heads=2, mlp_dim=16,
        causal=True, pool="end", end_id=1, projection="linear",
    ),
    embed_dim=8,
    matryoshka=(6, 8),
)  # fmt: skip


def small_bundle(seed=0, name="small"):
    captions = [f"a {colour} {shape}" for colour in COLOURS for shape in ("square", "stripe")]
    tokenizer = train_bpe(captions, 300, CONFIG.text.context_length)
    prompts = {"query": "a red square: ", "passage": ""}
    tokenizer = tokenizer.with_rules(dataclasses.replace(tokenizer.config, prompts=prompts))
    model = DualEncoder(CONFIG, rngs=nnx.Rngs(seed))
    return Bundle(model, Preprocess(PreprocessConfig(image_size=16)), tokenizer, name)


def drawn(number, size=(40, 30)):
    """Return a random picture, seeded by `number`."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (3, 4, 3)).astype(np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def saved_index(bundle, folder, metadata):
    """Save an index of drawn pictures, one for each metadata value, and return its folder."""
    count = len(next(iter(metadata.values())))
    paths = [folder / f"{number:02}.png" for number in range(count)]
    for number, path in enumerate(paths):
        drawn(number).save(path)
    index = RetrievalIndex(bundle)
    index.add(paths, metadata=metadata)
    index.save(folder / "index")
    return folder / "index"


def encoded(image, form="PNG"):
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


class Reply:
    """HTTP response: status, headers and body."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)


class Running:
    """Server in a thread of this process."""

    def __init__(self, app):
        self.app, self.service = app, app.state.service
        self.socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn_config(app))
        self._thread = threading.Thread(target=self._server.run, args=([self.socket],))
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)

    def ask(self, path, body=None, *, key=None, method=None, headers=None, timeout=20):
        """Send one request and return its reply; `body` is a JSON value, or raw bytes."""
        given = {"Content-Type": "application/json"} if body is not None else {}
        given |= {"Authorization": f"Bearer {key}"} if key else {}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, given | (headers or {}), method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return Reply(reply.status, reply.headers, reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, error.headers, error.read())

    def stop(self):
        self._server.should_exit = True
        self._thread.join()


@contextlib.contextmanager
def running(bundle, **options):
    """Serve `bundle` with these options of `create_app` until the block ends."""
    server = Running(create_app(bundle, **{"max_batch": 4, **options}))
    try:
        yield server
    finally:
        server.stop()
