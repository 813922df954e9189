"""Evaluations of a run: during training, and at its end with a report."""

import operator
import time
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import numpy as np
from jaxtyping import Float

from vlm.bundle import Bundle
from vlm.config import DataConfig, Experiment, to_dict
from vlm.data.class_names import described
from vlm.data.examples import templates_of
from vlm.data.sources import (
    all_captions,
    classes_of,
    first_captions,
    open_source,
    targets_of,
)
from vlm.evaluation.evidence import input_facts
from vlm.evaluation.gallery import gallery_png
from vlm.evaluation.metrics import Metric, pair_retrieval_metrics, zero_shot_metrics
from vlm.evaluation.runner import Report, Result, provenance
from vlm.evaluation.tasks import DataInfo
from vlm.evaluation.training_report import write_report
from vlm.heads.prompts import label_prompts
from vlm.heads.templates import describe_templates
from vlm.heads.zero_shot import to_scores
from vlm.inputs.tokenizer import Tokenizer
from vlm.training.console import print_on_first_process
from vlm.training.eval_tasks import Embedder, Inputs, Pixels, info, open_task
from vlm.training.logs import read_log
from vlm.training.run import Run
from vlm.training.step import Trainer, TrainState

SHOWN = 8  # images in the gallery


class Evaluations:
    """All evaluations of a run: its own held-out split, and the data sets of `evals`.

    Raises:
        DataError: data is missing, or lacks a column that its task needs.
    """

    def __init__(self, experiment: Experiment, trainer: Trainer, tokenizer: Tokenizer):
        embedder, inputs = Embedder(trainer), Inputs(trainer.preprocess, tokenizer)
        data, split, evals = experiment.data, experiment.data.eval_split, experiment.evals
        if experiment.eval_every == 0:
            split, evals = None, ()
        self.held_out = HeldOut(experiment, embedder, inputs) if split else None
        self.tasks = [open_task(config, embedder, inputs, data) for config in evals]
        if not self:
            why = "eval_every is 0"
            if experiment.eval_every != 0:
                why = "data.eval_split is not set, and evals is empty"
            print_on_first_process(f"the run is not evaluated: {why}")

    def __bool__(self) -> bool:
        return self.held_out is not None or bool(self.tasks)

    def metrics(self, state: TrainState) -> dict[str, float]:
        """Compute all metrics, as a row of the log."""
        row: dict[str, Metric] = {}
        if self.held_out is not None:
            zero_shot, retrieval = self.held_out.measure(*self.held_out.embed(state))
            row |= zero_shot | retrieval
            line = f"held-out top-1 {zero_shot['top1']}{_templates(self.held_out)}"
            print_on_first_process(f"step {int(state.step)}  {line}")
        for task in self.tasks:
            metrics = task.measure(state)
            name, first = task.config.name, next(iter(metrics))
            row |= {f"{name}/{metric}": value for metric, value in metrics.items()}
            line = f"{name} {first} {metrics[first]}{_templates(task)}"
            print_on_first_process(f"step {int(state.step)}  {line}")
        return {f"eval/{name}": float(value) for name, value in row.items()}


def _templates(task: Any) -> str:
    """Format the templates of a zero-shot evaluation for the log."""
    if task.templates == ("{}",):
        return ""
    return f", templates: {describe_templates(task.templates)}"


def _split(data: DataConfig) -> str:
    assert data.eval_split is not None  # required by every caller
    return data.eval_split


class HeldOut:
    """Evaluation of the held-out split: zero-shot over all captions of the data, and retrieval.

    All captions are encoded, so the data must be small. Labelled data is classified among its
    classes, as in `ZeroShot`.
    """

    def __init__(self, experiment: Experiment, embedder: Embedder, inputs: Inputs):
        self._embedder, self._inputs, self._data = embedder, inputs, experiment.data
        self._by_head = experiment.objective == "classification"
        self._source = open_source(self._data, _split(self._data))
        self.templates, self.about, self._names = ("{}",), {}, None
        if self._data.label:
            self.captions, names = classes_of(self._data, self._source)
            self.target = targets_of(self._source, self._data, self.captions)
            self.templates = templates_of(self._data)
            self.about = {"class_names": text} if (text := described(self.captions, names)) else {}
            self._names = None if self._by_head else names  # several classes may share one
            prompts = label_prompts(self.captions, names, self.templates)
            texts = [text for own in prompts.values() for text in own]
        else:
            self.captions = texts = all_captions(self._data)
            index = {caption: i for i, caption in enumerate(texts)}
            own = first_captions(self._source, self._data)
            self.target = np.array([index[text] for text in own], np.int32)
        if self._by_head:
            self.about = {"head": "a trained head in place of templates"}
        self._tokens = inputs.tokenizer(texts)

    @property
    def images(self) -> "_Images":
        """Return the preprocessed images, each read on access."""
        return _Images(self)

    def embed(self, state: TrainState) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]:
        """Compute unit-norm embeddings of the images and of all captions.

        In a classification the head's weights replace the embeddings of captions.
        """
        z_image = self._embedder.images(state, len(self.target), self.images.__getitem__)
        if self._by_head:
            return z_image, self._embedder.classes(state)
        return z_image, self._embedder.prompts(state, self._tokens, len(self.templates))

    def measure(self, z_image, z_captions) -> tuple[dict[str, Metric], dict[str, Metric]]:
        """Compute zero-shot accuracy over all captions, and retrieval among the held-out pairs."""
        return (
            zero_shot_metrics(z_image, z_captions, self.target, names=self._names),
            pair_retrieval_metrics(z_image, z_captions[self.target]),
        )


class _Images(Sequence):
    """Images of a held-out split, read on access."""

    def __init__(self, held_out: HeldOut):
        self._held_out = held_out

    def __len__(self) -> int:
        return len(self._held_out.target)

    def __getitem__(self, i: SupportsIndex) -> Pixels:  # pyright: ignore[reportIncompatibleMethodOverride]
        i = operator.index(i)
        if not 0 <= i < len(self):
            raise IndexError(i)
        held_out = self._held_out
        return held_out._inputs.pixels(held_out._source[i], held_out._data, i)


def finish(
    run: Run, evaluations: Evaluations, state: TrainState, bundle: Bundle, credits: str
) -> Report:
    """Evaluate the finished run; write its results and the report of its held-out split."""
    held_out, data = evaluations.held_out, run.experiment.data
    results, embedded, evidence = [], None, input_facts(bundle)
    if held_out is not None:
        start = time.perf_counter()
        embedded = held_out.embed(state)
        zero_shot, retrieval = held_out.measure(*embedded)
        about = DataInfo(data.source, split=data.eval_split or "")
        seconds = time.perf_counter() - start
        texts = evidence | held_out.about
        prompted = provenance(bundle.name, about, held_out.templates, seconds, texts)
        source = provenance(bundle.name, about, ("{}",), seconds, evidence)
        kind = "classes" if data.label else "captions"
        results = [
            Result(f"zero-shot over {len(held_out.captions):,} {kind}", zero_shot, prompted),
            Result(f"retrieval among {len(held_out.target):,} pairs", retrieval, source),
        ]
    for task in evaluations.tasks:
        start, config = time.perf_counter(), task.config
        metrics = task.measure(state)
        seconds, texts = time.perf_counter() - start, evidence | task.about
        source = provenance(bundle.name, info(task), task.templates, seconds, texts)
        results.append(Result(f"{config.name} {config.task}", metrics, source))
    report = Report(tuple(results))
    scale, bias = bundle.logit_scale, bundle.logit_bias  # collective: all processes take part
    if jax.process_index() == 0:
        report.save(run.results)
        if held_out is not None:
            _write_report(
                run, held_out, report, state, embedded, (scale, bias, bundle.loss), credits
            )
    return report


def _write_report(
    run: Run, held_out: HeldOut, report: Report, state, embedded, score_rule, credits
) -> None:
    """Write the report and the gallery of the held-out split."""
    z_image, z_captions = embedded
    scale, bias, loss = score_rule
    write_report(
        run.folder,
        history=read_log(run),
        results=report,
        images=held_out.images,
        captions=held_out.captions,
        target=held_out.target,
        z_image=z_image,
        z_captions=z_captions,
        config=to_dict(run.experiment),
        logit_scale=scale,
        logit_bias=bias,
        loss=loss,
        facts=_facts(state, run.experiment.preprocess.decode),
        credits=credits,
    )
    _draw_gallery(run, held_out, to_scores(scale * z_image @ z_captions.T + bias, loss))


def _draw_gallery(run: Run, held_out: HeldOut, scores: Float[np.ndarray, "n m"]) -> None:
    """Draw evenly spaced held-out images with their best captions."""
    data = run.experiment.data
    source = open_source(data, _split(data))
    count = len(held_out.target)
    chosen = np.linspace(0, count - 1, min(SHOWN, count)).astype(int)
    best = np.argsort(-scores[chosen], axis=1)[:, :4]
    gallery_png(
        run.folder / "gallery.png",
        [source[int(i)][data.image] for i in chosen],
        [
            [(held_out.captions[j], float(scores[i, j])) for j in row]
            for i, row in zip(chosen, best, strict=True)
        ],
        right=[held_out.captions[held_out.target[i]] for i in chosen],
    )


def _facts(state: TrainState, decode: str) -> dict[str, Any]:
    count = sum(x.size for x in jax.tree.leaves((state.params, state.frozen)))
    devices = jax.devices()
    return {
        "Parameters": f"{count / 1e6:.2f} M",
        "Devices": f"{len(devices)} x {devices[0].device_kind}",
        "Images decoded as": decode,
    }
