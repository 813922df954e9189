"""`vlm train`: from a config to a run folder."""

import os
from typing import Any

from vlm.cli import parse
from vlm.cli.parse import UsageError
from vlm.config import Experiment, load_config

ABOUT = """\
Train the model that a config describes. Every field of the config is an option; the defaults shown
are those of {config}.

With --init-from and any of --adapter.rank, .alpha, .targets, .dora and .quantize, low-rank adapters
are trained beside the model as it is (their help: add --adapter.rank 8 --help).

Progress goes to stderr, and the run folder is printed at the end. Ctrl-C saves a checkpoint and
leaves; a second one stops at once. A run goes on with --resume and its own config; what leaves its
checkpoints valid may be changed beside it (mesh, length, learning rate, rhythms, workers).

Several hosts: start the same command on each. Cloud TPU, SLURM, Open MPI and Kubernetes are found
by themselves; elsewhere add --coordinator HOST:PORT --processes N --process-id I, or set
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

Examples:
  vlm train configs/openmoji.py
  vlm train configs/openmoji.py --optimizer.learning-rate 3e-4 --epochs 10
  vlm train configs/openmoji.py --init-from runs/openmoji --adapter.rank 8
  vlm train --resume runs/openmoji
  vlm train --resume runs/openmoji --mesh.fsdp 4 --checkpoint-minutes 5
  vlm train --resume runs/openmoji --coordinator 10.0.0.1:1234 --processes 2 --process-id 0"""

USAGE = """\
usage: vlm train CONFIG [--FIELD VALUE ...]
       vlm train --resume RUN [--FIELD VALUE ...]

{about}

vlm train CONFIG --help lists the fields."""


def main(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(USAGE.format(about=ABOUT.format(config="that config")))
        if not args:
            raise UsageError("vlm train needs a config, such as configs/openmoji.py")
        return
    args, hosts = _hosts(args)
    if not args:
        raise UsageError("vlm train needs a config, such as configs/openmoji.py")
    first, *rest = args[0].split("=", 1) + args[1:]
    if first == "--resume":
        if not rest or rest[0].startswith("-"):
            raise UsageError("--resume needs the folder of the run: vlm train --resume RUN")
        run, *options = rest
        changed = _changed(run, options) if options else None
        return _train(hosts, changed, resume=run)
    if first.startswith("-"):
        raise UsageError(f"the config comes first: vlm train CONFIG {first} ...")
    return _train(hosts, experiment_of(args))


def experiment_of(args: list[str]) -> Experiment:
    """The experiment of a config with the fields that options name, such as CONFIG --epochs 3.

    Raises:
        ConfigError: no such config, or fields that contradict each other.
        UsageError: options that do not fit.
    """
    config, *options = args
    experiment = _before(load_config(config), options)
    return parse.options(experiment, "vlm train CONFIG", options, ABOUT.format(config=config))


HOSTS = {
    "--coordinator": ("coordinator", str),
    "--processes": ("process_count", int),
    "--process-id": ("process_id", int),
}


def _hosts(args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments without those of `vlm.cluster.processes.start`, and these."""
    rest, hosts = [], {}
    stream = iter(args)
    for arg in stream:
        name, given, value = arg.partition("=")
        if name not in HOSTS:
            rest.append(arg)
            continue
        key, kind = HOSTS[name]
        value = value if given else next(stream, "")
        try:
            hosts[key] = kind(value)
        except ValueError:
            raise UsageError(f"{name} takes a number, not {value!r}") from None
    return rest, hosts


def _changed(run: str, options: list[str]) -> Experiment:
    """The experiment of a run with the fields that `options` name."""
    from vlm.paths import as_path
    from vlm.train.run import experiment_in

    experiment = _before(experiment_in(as_path(run)), options)
    return parse.options(
        experiment, "vlm train --resume RUN", options, ABOUT.format(config="that run")
    )


def _before(experiment: Experiment, options: list[str]) -> Experiment:
    """The experiment that `options` change: without its length where they name another."""
    from vlm.train.changes import LENGTHS, without_length

    named = {option.split("=")[0].removeprefix("--") for option in options}
    return without_length(experiment) if named & set(LENGTHS) else experiment


def _train(hosts: dict[str, Any], experiment: Experiment | None, resume: str | None = None) -> None:
    import jax

    from vlm.cluster import processes

    processes.start(**hosts)
    from vlm.train.loop import train

    folder = train(experiment, resume=resume)
    if jax.process_index() == 0:
        print(os.fspath(folder))
