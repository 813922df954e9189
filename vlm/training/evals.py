"""Evaluations of a run: during training, and at its end with a report."""

import time
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import jax
import numpy as np
from jaxtyping import Float

from vlm.bundle import Bundle
from vlm.config import EvalConfig, Experiment, to_dict
from vlm.data.examples import templates_of
from vlm.data.sources import all_captions, classes_of, first_captions, open_source, targets_of
from vlm.evaluation.evidence import input_facts
from vlm.evaluation.gallery import gallery_png
from vlm.evaluation.metrics import Metric, pair_retrieval_metrics, zero_shot_metrics
from vlm.evaluation.runner import Report, Result, provenance
from vlm.evaluation.tasks import DataInfo
from vlm.evaluation.training_report import write_report
from vlm.heads.templates import describe_templates
from vlm.heads.zero_shot import to_scores
from vlm.inputs.tokenizer import Tokenizer
from vlm.training.console import log
from vlm.training.custom_evals import CustomEvals
from vlm.training.eval_tasks import Embedder, Pixels, info, open_task, prompts_of
from vlm.training.history import read_rows
from vlm.training.run import Run
from vlm.training.step import Trainer, TrainState

SHOWN = 8  # images in the gallery


class Evaluations:
    """All evaluations of a run: its own held-out split, and the data sets of `evals`.

    Raises:
        DataError: data is missing, or lacks a column that its task needs.
    """

    def __init__(self, experiment: Experiment, trainer: Trainer, tokenizer: Tokenizer):
        self.experiment = experiment
        embedder = Embedder(trainer)
        data, split, evals = experiment.data, experiment.data.eval_split, experiment.evals
        if experiment.eval_every == 0:
            split, evals = None, ()
        self.held_out = HeldOut(experiment, embedder, tokenizer) if split else None
        configs = [config for config in evals if isinstance(config, EvalConfig)]
        self.tasks = [open_task(config, embedder, tokenizer, data) for config in configs]
        self._own = CustomEvals(evals, trainer, tokenizer)
        self.description = self._describe(experiment, split)

    def _describe(self, experiment: Experiment, split: str | None) -> str:
        """Describe what is evaluated and when."""
        if experiment.eval_every == 0:
            return "none: eval_every is 0"
        if not self:
            return "none: data.eval_split is not set, and evals is empty"
        names = [f"{task.config.name} {task.config.task}" for task in self.tasks]
        names += self._own.names
        if self.held_out is not None:
            count = len(self.held_out.target)
            names = [f"{count:,} images of {experiment.data.source} {split}", *names]
        every = experiment.eval_every
        return f"{', '.join(names)}; {'at the end' if every is None else f'every {every:.0%}'}"

    def __bool__(self) -> bool:
        return self.held_out is not None or bool(self.tasks) or bool(self._own.names)

    def bundle(self, state: TrainState) -> Bundle:
        """Return the model of a state; it is valid until the next step."""
        return self._own.bundle(state)

    def own_metrics(self, state: TrainState) -> dict[str, float]:
        """Compute the metrics of the user's evaluations."""
        return self._own.metrics(state)

    def metrics(self, state: TrainState) -> dict[str, float]:
        """Compute all metrics, by their names in the log without "eval/".

        Raises:
            TrainingError: an evaluation of the user failed.
        """
        row: dict[str, Metric] = {}
        if self.held_out is not None:
            zero_shot, retrieval = self.held_out.measure(*self.held_out.embed(state))
            row |= zero_shot | retrieval
            top1, templates = zero_shot["top1"], _templates(self.held_out)
            log.info(f"step {int(state.step)}  held-out top-1 {top1}{templates}")
        for task in self.tasks:
            metrics = task.measure(state)
            name, first = task.config.name, next(iter(metrics))
            row |= {f"{name}/{metric}": value for metric, value in metrics.items()}
            value, templates = metrics[first], _templates(task)
            log.info(f"step {int(state.step)}  {name} {first} {value}{templates}")
        return {name: float(value) for name, value in row.items()} | self.own_metrics(state)


def _templates(task: Any) -> str:
    """Format the templates of a zero-shot evaluation for the log."""
    if task.templates == ("{}",):
        return ""
    return f", templates: {describe_templates(task.templates)}"


class HeldOut:
    """Evaluation of the held-out split: zero-shot over all captions of the data, and retrieval.

    All captions are encoded, so the data must be small. Labelled data is classified among its
    classes, as in `ZeroShot`.
    """

    def __init__(self, experiment: Experiment, embedder: Embedder, tokenizer: Tokenizer):
        self._embedder, self._data = embedder, experiment.data
        self.decode = experiment.preprocess.decode
        self._by_head = experiment.objective == "classification"
        assert self._data.eval_split is not None
        self._source = open_source(self._data, self._data.eval_split)
        self.templates, self.about, self._names = ("{}",), {}, None
        if self._data.label:
            self.captions, names = classes_of(self._data, self._source)
            self.target = targets_of(self._source, self._data, self.captions)
            self.templates = templates_of(self._data)
            self._names = None if self._by_head else names  # several classes may share one
            texts, self.about = prompts_of(self.captions, names, self.templates)
        else:
            self.captions = texts = all_captions(self._data)
            index = {caption: i for i, caption in enumerate(texts)}
            own = first_captions(self._source, self._data)
            self.target = np.array([index[text] for text in own], np.int32)
        if self._by_head:
            self.about = {"head": "a trained head in place of templates"}
        self._tokens = tokenizer(texts)
        self.images = _Images(self._pixels, len(self.target))

    def embed(self, state: TrainState) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]:
        """Compute unit-norm embeddings of the images and of all captions.

        In a classification the head's weights replace the embeddings of captions.
        """
        z_image = self._embedder.images(state, len(self.target), self._pixels)
        if self._by_head:
            return z_image, self._embedder.classes(state)
        return z_image, self._embedder.prompts(state, self._tokens, len(self.templates))

    def _pixels(self, i: int) -> Pixels:
        return self._embedder.pixels(self._source[i], self._data, i)

    def measure(self, z_image, z_captions) -> tuple[dict[str, Metric], dict[str, Metric]]:
        """Compute zero-shot accuracy over all captions, and retrieval among the held-out pairs."""
        return (
            zero_shot_metrics(z_image, z_captions, self.target, names=self._names),
            pair_retrieval_metrics(z_image, z_captions[self.target]),
        )


class _Images(Sequence):
    """Preprocessed images of a held-out split, each read on access."""

    def __init__(self, read: Callable[[int], Pixels], count: int):
        self._read, self._places = read, range(count)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: SupportsIndex) -> Pixels:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._read(self._places[i])


def evaluate_finished_run(
    run: Run, evaluations: Evaluations, state: TrainState, bundle: Bundle, credits: str
) -> tuple[Report, dict[str, float]]:
    """Evaluate the finished run; write its results and the report of its held-out split.

    Returns also all values, by their names in the log without "eval/".
    """
    held_out, data = evaluations.held_out, evaluations.experiment.data
    results, embedded, evidence = [], None, input_facts(bundle)
    values: dict[str, Any] = {}
    if held_out is not None:
        start = time.perf_counter()
        embedded = held_out.embed(state)
        zero_shot, retrieval = held_out.measure(*embedded)
        about = DataInfo(data.source, split=data.eval_split or "")
        seconds = time.perf_counter() - start
        texts = evidence | held_out.about
        values |= zero_shot | retrieval
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
        values |= {f"{config.name}/{name}": value for name, value in metrics.items()}
    report = Report(tuple(results))
    scale, bias = bundle.logit_scale, bundle.logit_bias  # collective: all processes take part
    if jax.process_index() == 0:
        report.save(run.results)
        if held_out is not None:
            rule = scale, bias, bundle.loss
            _write_report(run, held_out, report, state, embedded, rule, credits)
    return report, {name: float(value) for name, value in values.items()}


def _write_report(run: Run, held_out: HeldOut, report: Report, state, embedded, rule, credits):
    """Write the report of the held-out split, and a gallery of evenly spaced images."""
    z_image, z_captions = embedded
    scale, bias, loss = rule
    data, captions, target = held_out._data, held_out.captions, held_out.target
    write_report(
        run.folder,
        history=read_rows(run.log),
        results=report,
        images=held_out.images,
        captions=captions,
        target=target,
        z_image=z_image,
        z_captions=z_captions,
        config=to_dict(run.experiment),
        logit_scale=scale,
        logit_bias=bias,
        loss=loss,
        facts=_facts(state, held_out.decode),
        credits=credits,
    )
    chosen = np.linspace(0, len(target) - 1, min(SHOWN, len(target))).astype(int)
    scores = to_scores(scale * z_image[chosen] @ z_captions.T + bias, loss)
    gallery_png(
        run.folder / "gallery.png",
        [held_out._source[int(i)][data.image] for i in chosen],
        [[(captions[j], float(row[j])) for j in np.argsort(-row)[:4]] for row in scores],
        right=[captions[target[i]] for i in chosen],
    )


def _facts(state: TrainState, decode: str) -> dict[str, Any]:
    count = sum(x.size for x in jax.tree.leaves((state.params, state.frozen)))
    devices = jax.devices()
    return {
        "Parameters": f"{count / 1e6:.2f} M",
        "Devices": f"{len(devices)} x {devices[0].device_kind}",
        "Images decoded as": decode,
    }
