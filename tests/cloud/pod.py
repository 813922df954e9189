"""What a pod has, and how its runs look from the bucket's side.

The commands are those of the page `vlm/docs/howto/pod.md`, word for word. They are made small by
options after the script's own, and by the environment.
"""

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import tiny
from bucket import NAME, Bucket
from hosts import ROOT, environment

STEPS = 60
BATCH = 12  # which one to four hosts can share, as they can the shards
SHARDS, PER_SHARD = 12, 12
PAGE = ROOT / "vlm" / "docs" / "howto" / "pod.md"
BUCKET = f"gs://{NAME}"
WORDNET_IDS = ("n01440764", "n01443537", "n01484850")

# The recipe of `siglip_b16` for towers of one thin block. The text embedding is wide enough for a
# mesh to cut it over `fsdp`.
SMALL = f"""
--model.vision.image-size 16 --preprocess.image-size 16 --model.vision.patch-size 8
--model.vision.width 16 --model.vision.depth 1 --model.vision.heads 2 --model.vision.mlp-dim 16
--model.text.width 64 --model.text.depth 1 --model.text.heads 2 --model.text.mlp-dim 64
--model.text.vocab-size 280 --model.embed-dim 16
--model.vision.dropout 0.1 --model.text.dropout 0.1
--data.interleave {SHARDS} --data.shuffle {SHARDS * PER_SHARD} --batch-size {BATCH} --steps {STEPS}
--log-every 1 --checkpoint-every 0.2 --eval-every 0.5 --remat none --no-scan
""".split()


class Pod:
    """What a pod has: a bucket, the scripts of the page, and the environment of its hosts."""

    def __init__(self, folder: Path, bucket: Bucket, workers: int = 0):
        self.folder, self.bucket = folder, bucket
        self.small = [*SMALL, "--data.workers", str(workers)]
        self.env = environment(folder, bucket.environment()) | {
            "BUCKET": BUCKET,
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "SMALL_PREPARE": f"--examples {PER_SHARD}",
        }

    @functools.cached_property
    def artefacts(self) -> str:
        """Fill the bucket by the page's commands; return their output."""
        work = self.folder / "work"
        work.mkdir()
        self._write_raw_data(work)
        self._write_hub()
        done = subprocess.run(
            ["sh", "-ex", "-c", block("vlm data tokenizer")],
            cwd=work, env=self.env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    @property
    def train(self) -> list[str]:
        """Arguments of `vlm train` for the small run."""
        return ["siglip_b16", "--bucket", BUCKET, *self.small]

    def go(self, run: str) -> list[str]:
        """The command of every host: the page's go.sh, for a run of this name."""
        assert self.artefacts
        script = self.folder / "go.sh"
        script.write_text(block("#!/bin/sh"))
        return ["env", f"RUN={BUCKET}/runs/{run}", "sh", str(script), *self.small]

    def run(self, name: str) -> Path:
        """Where the bucket keeps a run."""
        return self.bucket.root / "runs" / name

    def _write_raw_data(self, work: Path) -> None:
        """Write pairs, ImageNet's folders and COCO's file, of a few drawings."""
        data = tiny.folder() / "data"
        rows = [row.split(",") for row in (data / "captions.csv").read_text().splitlines()[1:]]
        pairs = [rows[i % len(rows)] for i in range(SHARDS * PER_SHARD)]
        lines = ["image,caption", *(f"{data / name},{caption}" for name, caption, _ in pairs)]
        (work / "pairs.csv").write_text("\n".join(lines))
        images = []
        for i, (name, caption, _) in enumerate(rows[:15]):
            folder = work / "imagenet" / "val" / WORDNET_IDS[i % len(WORDNET_IDS)]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(data / name, folder / name)
            sentences = [{"raw": caption}, {"raw": f"a picture of {caption}"}]
            images.append({"filename": name, "split": "test", "sentences": sentences})
            (work / "coco" / "val2014").mkdir(parents=True, exist_ok=True)
            shutil.copy(data / name, work / "coco" / "val2014" / name)
            images[-1]["filepath"] = "val2014"
        (work / "coco" / "dataset_coco.json").write_text(json.dumps({"images": images}))

    def _write_hub(self) -> None:
        """Put a small SigLIP into the Hub's cache, under the name that the page has."""
        cache = self.folder / "hub" / "hub" / "models--google--siglip-base-patch16-224"
        commit = "0" * 40
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text(commit)
        tiny.siglip_folder(cache / "snapshots" / commit)


def block(sign: str) -> str:
    """The one block of shell on the page that has `sign` in it, word for word."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (found,) = (text for text in blocks if sign in text)
    return found


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
