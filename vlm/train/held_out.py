"""The held-out split of a run: measured during training, and at its end with a report."""

import time
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from vlm.bundle import Bundle
from vlm.config import Experiment, to_dict
from vlm.data.pipeline import eval_batches
from vlm.data.sources import all_captions, held_out, open_source
from vlm.evaluate.gallery import gallery_png
from vlm.evaluate.metrics import Metric, pair_retrieval_metrics, zero_shot_metrics
from vlm.evaluate.report import write_report
from vlm.evaluate.runner import Report, Result, provenance
from vlm.evaluate.tasks import DataInfo
from vlm.heads.zero_shot import to_scores
from vlm.inputs.tokenizer import Tokenizer
from vlm.sharding import batch_sharding, batch_ways
from vlm.train.logs import print_on_first_process, read_log
from vlm.train.run import Run
from vlm.train.step import Trainer, TrainState

ROWS = 256  # embedded at a time
SHOWN = 8  # images in the gallery


class HeldOut:
    """Images the run does not train on, among all captions of the data."""

    def __init__(self, experiment: Experiment, trainer: Trainer, tokenizer: Tokenizer):
        self.experiment, self.trainer = experiment, trainer
        ways = batch_ways(trainer.mesh)
        self._rows = -(-ROWS // ways) * ways
        data = experiment.data
        self.captions = all_captions(data)
        self.target: Int[np.ndarray, n] = held_out(data)
        self._tokens = tokenizer(self.captions)
        batches = eval_batches(data, trainer.preprocess, tokenizer, batch_size=self._rows)
        self.images = np.concatenate([b["images"][b["mask"]] for b in batches])

    def embed(self, state: TrainState) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]:
        """Unit-norm embeddings of the images and of all captions."""
        return (
            self._in_batches(self.trainer.embed_images, state, self.images),
            self._in_batches(self.trainer.embed_texts, state, self._tokens),
        )

    def measure(self, z_image, z_captions) -> tuple[dict[str, Metric], dict[str, Metric]]:
        """Zero-shot accuracy over all captions, and retrieval among the held-out pairs."""
        return (
            zero_shot_metrics(z_image, z_captions, self.target),
            pair_retrieval_metrics(z_image, z_captions[self.target]),
        )

    def metrics(self, state: TrainState) -> dict[str, float]:
        """All metrics as a row of the log."""
        zero_shot, retrieval = self.measure(*self.embed(state))
        print_on_first_process(f"step {int(state.step)}  held-out top-1 {zero_shot['top1']}")
        return {f"eval/{name}": float(value) for name, value in (zero_shot | retrieval).items()}

    def _in_batches(self, embed, state, rows: np.ndarray) -> np.ndarray:
        """Rows through `embed`, a fixed number at a time; every process holds all of them."""
        sharding = batch_sharding(self.trainer.mesh)
        out = []
        for first in range(0, len(rows), self._rows):
            part = rows[first : first + self._rows]
            padding = [(0, self._rows - len(part))] + [(0, 0)] * (rows.ndim - 1)
            padded = np.pad(part, padding)
            batch = jax.make_array_from_callback(padded.shape, sharding, padded.__getitem__)
            out.append(np.asarray(embed(state, batch))[: len(part)])
        return np.concatenate(out)


def finish(run: Run, held: HeldOut, state: TrainState, bundle: Bundle, credits: str) -> Report:
    """Measure the finished run, and write its results and report."""
    start = time.perf_counter()
    z_image, z_captions = held.embed(state)
    zero_shot, retrieval = held.measure(z_image, z_captions)
    data = run.experiment.data
    info = DataInfo(data.source, split=data.eval_split or "")
    source = provenance(bundle.name, info, ("{}",), time.perf_counter() - start)
    report = Report(
        (
            Result(f"zero-shot over {len(held.captions):,} captions", zero_shot, source),
            Result(f"retrieval among {len(held.images):,} pairs", retrieval, source),
        )
    )
    scale, bias = bundle.logit_scale, bundle.logit_bias  # of all processes together
    if jax.process_index() == 0:
        report.save(run.results)
        write_report(
            run.folder,
            history=read_log(run),
            results=report,
            images=list(held.images),
            captions=held.captions,
            target=held.target,
            z_image=z_image,
            z_captions=z_captions,
            config=to_dict(run.experiment),
            logit_scale=scale,
            logit_bias=bias,
            loss=bundle.loss,
            facts=_facts(state),
            credits=credits,
        )
        scores = to_scores(scale * z_image @ z_captions.T + bias, bundle.loss)
        _draw_gallery(run, held, scores)
    return report


def _draw_gallery(run: Run, held: HeldOut, scores: Float[np.ndarray, "n m"]) -> None:
    """Some held-out images, evenly spaced, with their best captions, as a picture to show."""
    data = run.experiment.data
    source = open_source(data, data.eval_split)
    chosen = np.linspace(0, len(held.images) - 1, min(SHOWN, len(held.images))).astype(int)
    best = np.argsort(-scores[chosen], axis=1)[:, :4]
    gallery_png(
        run.folder / "gallery.png",
        [source[int(i)][data.image] for i in chosen],
        [
            [(held.captions[j], float(scores[i, j])) for j in row]
            for i, row in zip(chosen, best, strict=True)
        ],
        right=[held.captions[held.target[i]] for i in chosen],
    )


def _facts(state: TrainState) -> dict[str, Any]:
    count = sum(x.size for x in jax.tree.leaves((state.params, state.frozen)))
    devices = jax.devices()
    return {
        "Parameters": f"{count / 1e6:.2f} M",
        "Devices": f"{len(devices)} x {devices[0].device_kind}",
    }
