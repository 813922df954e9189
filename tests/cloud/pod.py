"""What a pod has, and how its runs look from the bucket's side."""

import io
import json
import re
import tarfile
from pathlib import Path

import tiny
from bucket import NAME, Bucket
from hosts import ROOT, environment

STEPS = 60
BATCH = 12  # which one to four hosts can share, as they can the shards
SHARDS, PER_SHARD = 12, 12

CONFIG = """\
import dataclasses
import runpy

from vlm.config import *

shapes = runpy.run_path({shapes!r})["config"]
config = dataclasses.replace(
    shapes,
    name="pod",
    model=dataclasses.replace(
        shapes.model,
        vision=dataclasses.replace(shapes.model.vision, dropout=0.1),
        # Wide enough for a mesh to cut its embedding over `fsdp`.
        text=dataclasses.replace(shapes.model.text, dropout=0.1, width=64, mlp_dim=64),
    ),
    data=DataConfig(source="given on the command line", eval_split=None, workers={workers}),
    batch_size={batch},
    steps={steps},
    log_every=1,
    checkpoint_every=0.2,
)
"""


class Pod:
    """What a pod has: a bucket, a config, `go.sh`, and the environment of its hosts."""

    def __init__(self, folder: Path, bucket: Bucket, workers: int = 0):
        self.folder, self.bucket = folder, bucket
        self.env = environment(folder, bucket.environment())
        config = CONFIG.format(
            shapes=str(tiny.folder() / "shapes.py"),
            batch=BATCH,
            steps=STEPS,
            workers=workers,
        )
        (folder / "pod.py").write_text(config)
        self._write_shards()
        self._write_tokenizer()

    def go(self, run: str) -> list[str]:
        """The command of every host: README's go.sh, with this pod's names in it."""
        script, shards = readme_script(), f"{{000..{SHARDS - 1:03}}}"
        for theirs, ours in {
            "gs://BUCKET/runs/siglip-b16": f"gs://{NAME}/runs/{run}",
            "configs/siglip_b16.py": str(self.folder / "pod.py"),
            "gs://BUCKET/pairs/{000000..099999}.tar": f"gs://{NAME}/pairs/{shards}.tar",
            "gs://BUCKET/tokenizers/c4_en/tokenizer.json": f"gs://{NAME}/tokenizers/tokenizer.json",
        }.items():
            assert theirs in script, f"README's go.sh has no {theirs} any more"
            script = script.replace(theirs, ours)
        file = self.folder / f"go-{run}.sh"
        file.write_text(script)
        return ["sh", str(file)]

    def run(self, name: str) -> Path:
        """Where the bucket keeps a run."""
        return self.bucket.root / "runs" / name

    def _write_shards(self) -> None:
        rows = (tiny.folder() / "data" / "captions.csv").read_text().splitlines()[1:]
        rows = [row.split(",") for row in rows]
        for shard in range(SHARDS):
            whole = io.BytesIO()
            with tarfile.open(fileobj=whole, mode="w") as tar:
                for i in range(PER_SHARD):
                    name, caption, _ = rows[(shard * PER_SHARD + i) % len(rows)]
                    for ending, content in (
                        ("png", (tiny.folder() / "data" / name).read_bytes()),
                        ("txt", caption.encode()),
                    ):
                        member = tarfile.TarInfo(f"{shard}{i:05}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            self.bucket.write(f"pairs/{shard:03}.tar", whole.getvalue())

    def _write_tokenizer(self) -> None:
        from vlm.inputs.tokenizer import train_bpe

        texts = [f"a {colour} {shape}" for colour in tiny.COLOURS for shape in ("square", "stripe")]
        train_bpe(texts, 280, 12).save(self.folder / "tokenizer")
        vocabulary = (self.folder / "tokenizer" / "tokenizer.json").read_bytes()
        self.bucket.write("tokenizers/tokenizer.json", vocabulary)


def readme_script() -> str:
    """`go.sh`, word for word."""
    blocks = re.findall(r"```sh\n(#!/bin/sh\n.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    return blocks[0]


def whole_checkpoints(run: Path) -> list[int]:
    """The steps of a run's checkpoints that count. (The server leaves empty folders behind.)"""
    return sorted(int(p.parent.name) for p in (run / "checkpoints").glob("*/commit_success.txt"))


def partial_checkpoints(run: Path) -> list[int]:
    """The steps of those that were begun."""
    begun = {int(p.relative_to(run / "checkpoints").parts[0])
             for p in (run / "checkpoints").rglob("*") if p.is_file()}  # fmt: skip
    return sorted(begun - set(whole_checkpoints(run)))


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(run) if "loss" in row]


def weights(run: Path) -> bytes:
    return (run / "bundle" / "model.safetensors").read_bytes()
