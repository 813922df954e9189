"""`vlm train`: train a model from a config, or resume a run."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from vlm.cli import elastic, parse
from vlm.cli.commands import COMMON, UsageError
from vlm.cli.help import Page, of_config
from vlm.cli.signatures import Option
from vlm.config import (
    DataConfig,
    Experiment,
    load_config,
    require_bucket,
    with_bucket,
    without_evals,
)
from vlm.config.defaults import with_default_model
from vlm.errors import brief

ABOUT = """\
Train the model of a config, fine-tune a model, or resume a run. Every field of the config is an
option.

The defaults shown are those of {config}.

Progress is printed to stderr, and the run folder to stdout at the end. Ctrl-C saves a checkpoint
and exits; a second Ctrl-C exits at once. --resume accepts all options that keep the saved
state valid (such as mesh, batch size, data, run length, learning rate), and refuses others by name.

With --init-from, the model, its preprocessing and its tokenizer are those of MODEL (all that
vlm.load accepts), unless the config has a model; --init-image-size and --init-context-length resize
it. --adapter.rank and the other options of adapter train low-rank adapters of the frozen model.
Without a config, --data.source names the data, and what the data decides is logged with its option:
class folders are classes, a fifth of each is the validation split unless there is one, and batch
size and epochs follow the number of images.

Configs for large runs name their files under gs://BUCKET; --bucket gs://NAME (or a folder) replaces
that.

Several hosts: start the same command on each. Cloud TPU, SLURM, Open MPI and Kubernetes are
detected. Elsewhere add --coordinator HOST:PORT --processes N --process-id I, or set
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

Elastic: --processes MIN:MAX on each host restarts the run after failures, with the processes that
remain. It needs a --run-dir that all hosts share, and --process-id; a coordinator is chosen.

Examples:
  vlm train openmoji
  vlm train configs/openmoji.py --optimizer.learning-rate 3e-4 --epochs 10
  vlm train --init-from EVA02-B-16 --data.source photos.csv
  vlm train --init-from EVA02-B-16 --data.source pets/
  vlm train openmoji --init-from runs/openmoji --adapter.rank 8
  vlm train --resume runs/openmoji --mesh.fsdp 4 --checkpoint-minutes 5
  vlm train configs/siglip_b16.py --bucket gs://my-bucket
  vlm train --resume runs/openmoji --coordinator 10.0.0.1:1234 --processes 2 --process-id 0
  vlm train openmoji --run-dir /shared/openmoji --processes 2:4 --process-id 0"""

USAGE = (
    "vlm train CONFIG [options]",
    "vlm train [CONFIG] --init-from MODEL [options]",
    "vlm train --resume RUN [options]",
)
MORE = (
    Option("--resume", "RUN", "Run to resume. It continues from its last checkpoint.", "none"),
    Option("--bucket", "PLACE", "Bucket or folder in place of gs://BUCKET in the config.", "none"),
    Option("--skip-evals", "NAME,NAME,...", "Evaluations of the config to leave out.", "none"),
    Option(
        "--phases",
        "JSON|FILE",
        "Changes of fields on the way, as a JSON list or a file of it, such as "
        """'[{"fraction": 0.9, "changes": {"text_masking": 0}}]'.""",
        "those of the config",
    ),
    Option("--coordinator", "HOST:PORT", "Address of process 0, for several hosts.", "detected"),
    Option(
        "--processes",
        "INTEGER|MIN:MAX",
        "Number of processes of all hosts; with MIN:MAX, an elastic run.",
        "detected",
    ),
    Option("--process-id", "INTEGER", "Number of this process, from 0.", "detected"),
    Option(
        "--rejoin-timeout",
        "SECONDS",
        "Elastic: how long a start waits for all MAX processes.",
        "300",
    ),
    Option(
        "--max-restarts",
        "INTEGER",
        "Elastic: restarts in a row without a new checkpoint.",
        "3",
    ),
    Option(
        "--local-addr", "HOST", "Elastic: address of this host for the other hosts.", "detected"
    ),
)

NO_CONFIG = "vlm train needs a config, such as configs/openmoji.py, or --init-from MODEL"

# Defaults for `vlm train --init-from` without a config; no evaluation unless configured.
FINE_TUNING = Experiment(batch_size=128, epochs=10, data=DataConfig(eval_split=None))


def main(args: list[str]) -> None:
    if parse.asks_for_help(args[:1]):
        parse.print_help(args, help_page)
    hosts, args = _extract(args, HOSTS)
    supervision, args = _extract(args, elastic.OPTIONS)
    if not args:
        raise UsageError(NO_CONFIG)
    if isinstance(hosts.get("process_count"), tuple):
        return elastic.supervise(args, **hosts, **supervision)
    if supervision:
        name = next(name for name, (key, _) in elastic.OPTIONS.items() if key in supervision)
        raise UsageError(f"{name} is for elastic runs: give --processes MIN:MAX, or leave it out")
    first, *rest = args[0].split("=", 1) + args[1:]
    if first == "--resume":
        if not rest or rest[0].startswith("-"):
            raise UsageError("--resume needs the folder of the run: vlm train --resume RUN")
        run, *options = rest
        changed = _changed(run, options) if options else None
        return _train(hosts, changed, resume=run)
    given = None if not args[0].startswith("-") else _names_of(args)
    return _train(hosts, experiment_of(args), given=given)


def experiment_of(args: list[str]) -> Experiment:
    """Make the experiment of `CONFIG --epochs 3` or `--init-from MODEL --data.source photos`.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: there is no such config, or fields contradict each other.
        UsageError: wrong options.
    """
    from vlm.training.data_defaults import with_texts
    from vlm.training.init_from import with_model

    config, options = (None, args) if args[0].startswith("-") else (args[0], args[1:])
    start, rest = _extract(options, START)
    places, rest = _extract(rest, PLACES)
    if config is not None:
        experiment = load_config(config)
        if "bucket" in places:
            experiment = with_bucket(experiment, places["bucket"])
    elif "init_from" in start:
        name = os.path.basename(start["init_from"].rstrip("/")).partition(".")[0]
        experiment = dataclasses.replace(FINE_TUNING, name=f"{name}-finetuned")
        if "bucket" in places:
            raise UsageError("--bucket needs a config that names gs://BUCKET: vlm train CONFIG")
        named, rest = _extract(rest, DATA)
        data = dataclasses.replace(experiment.data, **named)
        experiment = dataclasses.replace(experiment, data=with_texts(data, _names_of(options)))
    else:
        raise UsageError(
            f"the config comes first: vlm train CONFIG {args[0]} ..., or give a model with "
            "--init-from"
        )
    experiment = dataclasses.replace(experiment, **start)
    page = functools.partial(help_page, source=config or "a run without a config")
    if experiment.init_from is None:  # else the help needs the sizes of that model
        parse.print_help(rest, lambda: page(with_default_model(experiment)))
    if experiment.model is None and experiment.init_from is not None:
        # A size option of the model or of its inputs sets both.
        sizes, _ = _extract(rest, SIZES)
        experiment = dataclasses.replace(experiment, **(sizes | start))
    if "phases" in places:  # they may change what the other options set
        experiment = dataclasses.replace(experiment, phases=())
    experiment = with_model(_without_replaced_length(experiment, rest))
    experiment = _with_places(parse.options(experiment, "vlm train", rest, page), places)
    require_bucket(experiment)
    return experiment


def help_page(
    experiment: Experiment | None = None, source: str = "a config that sets none"
) -> Page:
    """Return the help of `vlm train`, with the values of `experiment` as defaults."""
    return of_config(
        experiment or with_default_model(Experiment()),
        "vlm train",
        ABOUT.format(config=source),
        usage=USAGE,
        more=MORE,
        common=COMMON["train"],
    )


HOSTS = {
    "--coordinator": ("coordinator", str),
    "--processes": ("process_count", elastic.count_or_range),
    "--process-id": ("process_id", int),
}
START = {
    "--init-from": ("init_from", str),
    "--init-towers": ("init_towers", str),
    "--init-image-size": ("init_image_size", int),
    "--init-context-length": ("init_context_length", int),
}
DATA = {"--data.source": ("source", str), "--data.train-split": ("train_split", str)}
PLACES = {
    "--bucket": ("bucket", str),
    "--skip-evals": ("skip_evals", str),
    "--phases": ("phases", str),
}
SIZES = {
    "--model.vision.image-size": ("init_image_size", int),
    "--preprocess.image-size": ("init_image_size", int),
    "--model.text.context-length": ("init_context_length", int),
    "--tokenizer.context-length": ("init_context_length", int),
}


def _extract(
    args: list[str], known: Mapping[str, tuple[str, Callable[[str], Any]]]
) -> tuple[dict[str, Any], list[str]]:
    """Remove the options in `known` from the arguments; return their values and the rest."""
    found, rest = {}, []
    stream = iter(args)
    for arg in stream:
        name, given, value = arg.partition("=")
        if name not in known:
            rest.append(arg)
            continue
        key, kind = known[name]
        value = value if given else next(stream, "")
        try:
            found[key] = kind(value)
        except ValueError:
            raise UsageError(f"{name} takes a number, not {value!r}") from None
        if not value:
            raise UsageError(f"{name} needs a value: see vlm train --help")
    return found, rest


def _changed(run: str, options: list[str]) -> Experiment:
    """Load the experiment of a run, and apply the options."""
    from vlm.paths import as_path
    from vlm.training.run import experiment_in

    places, options = _extract(options, PLACES)
    if "bucket" in places:
        raise UsageError("--bucket is for a new run: the config of a run names its own bucket")
    experiment = _without_replaced_length(experiment_in(as_path(run)), options)
    page = functools.partial(help_page, source=run)
    if "phases" in places:
        experiment = dataclasses.replace(experiment, phases=())
    return _with_places(parse.options(experiment, "vlm train", options, page), places)


def _with_places(experiment: Experiment, places: dict[str, str]) -> Experiment:
    """Apply --skip-evals and --phases."""
    names = places.get("skip_evals", "").split(",")
    experiment = without_evals(experiment, [name.strip() for name in names if name.strip()])
    if "phases" in places:
        experiment = dataclasses.replace(experiment, phases=_phases_of(places["phases"]))
    return experiment


def _phases_of(text: str) -> list[Any]:
    """Parse the JSON of --phases, or of the file that it names."""
    try:
        if not text.lstrip().startswith("["):
            with open(text, encoding="utf-8") as file:
                text = file.read()
        phases = json.loads(text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"--phases {brief(text)} is no JSON list and no file of one: {reason}"
        ) from None
    if not isinstance(phases, list):
        raise UsageError(f"--phases is {brief(phases)}: give a list, such as [{{...}}]")
    return phases


def _without_replaced_length(experiment: Experiment, options: list[str]) -> Experiment:
    """Remove the run length (steps, epochs, ...) if the options set another."""
    from vlm.training.changes import LENGTHS, without_length

    return without_length(experiment) if _names_of(options) & set(LENGTHS) else experiment


def _names_of(options: list[str]) -> set[str]:
    """Return the names of the options, such as "data.eval-split"."""
    named = (option.split("=")[0] for option in options if option.startswith("--"))
    return {name.removeprefix("--").replace("_", "-") for name in named}


def _train(
    hosts: dict[str, Any],
    experiment: Experiment | None,
    resume: str | None = None,
    given: set[str] | None = None,
) -> None:
    """Train or resume; without a config, `given` are the options, and the data fills in others."""
    import jax

    from vlm.cluster import processes, watch

    processes.start(**hosts)
    from vlm.training.loop import train

    if experiment is not None and given is not None:
        from vlm.training.console import log
        from vlm.training.data_defaults import DataDefaults

        with processes.stop_all_on_failure():
            filled = DataDefaults(experiment, given)
        experiment = filled.experiment
        for line in filled.lines():
            log.info(line)
    result = train(experiment, resume=resume)
    if jax.process_index() == 0:
        print(os.fspath(result))
    if watch.is_supervised() and not result.finished:
        raise SystemExit(watch.STOPPED)
