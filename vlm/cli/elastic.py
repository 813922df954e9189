"""`vlm train --processes MIN:MAX`: supervise the training process of this host."""

import json
import os
import sys

from vlm.cli.commands import UsageError

OPTIONS = {
    "--rejoin-timeout": ("rejoin_timeout", float),
    "--max-restarts": ("max_restarts", int),
    "--local-addr": ("local_addr", str),
}
FOLDER = "elastic"  # in the run folder


def count_or_range(text: str) -> int | tuple[int, int]:
    """Parse a number of processes, or MIN:MAX."""
    fewest, colon, most = text.partition(":")
    if not colon:
        return int(text)
    if not 1 <= int(fewest) <= int(most):
        raise UsageError(f"--processes {text} has no numbers from MIN to MAX: give 2:4, say")
    return int(fewest), int(most)


def supervise(
    args: list[str],
    process_count: tuple[int, int],
    process_id: int | None = None,
    coordinator: str | None = None,
    rejoin_timeout: float = 300.0,
    max_restarts: int = 3,
    local_addr: str | None = None,
) -> None:
    """Run `vlm train ARGS` in a process of its own until the run ends, over failures of others.

    Raises:
        ConfigError: too few processes came, or the run failed too often.
        UsageError: an option is missing, or does not fit.
    """
    from vlm.cluster.elastic import Hosts, Supervisor, local_address
    from vlm.paths import as_config_error, as_path
    from vlm.training.history import read_history

    fewest, most = process_count
    if coordinator is not None:
        raise UsageError(
            "--coordinator does not fit --processes MIN:MAX, which chooses one at each start: "
            "leave it out"
        )
    if process_id is None and (given := os.environ.get("JAX_PROCESS_ID", "")).isdigit():
        process_id = int(given)
    if process_id is None or not 0 <= process_id < most:
        raise UsageError(
            f"--processes {fewest}:{most} needs a --process-id from 0 to {most - 1}, other than "
            f"that of all other processes, and has {process_id}: give $SLURM_PROCID or "
            "$JOB_COMPLETION_INDEX, say"
        )
    resumes = args[0].partition("=")[0] == "--resume"
    run_dir = _value(args, "--resume" if resumes else "--run-dir")
    if not run_dir:
        raise UsageError("an elastic run needs a --run-dir that all hosts share, or --resume RUN")
    run = as_path(run_dir)
    folder = run / FOLDER
    with as_config_error(f"{folder} cannot be written", "give another --run-dir"):
        folder.mkdir(parents=True, exist_ok=True)
        if not resumes:
            _check_command(args, run_dir)

    def command() -> list[str]:
        started = not resumes and (run / "config.json").exists()
        rest = ["--resume", run_dir] if started else args
        return [sys.executable, "-m", "vlm", *_common(sys.argv[1:]), "train", *rest]

    def progress() -> int:
        """Return the step of the newest checkpoint, which may be local to the hosts."""
        checkpoints = run / "checkpoints"
        names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
        steps = [int(name) for name in names if name.isdigit()]
        return max([*steps, *(row["step"] for row in read_history(run)[-1:])], default=-1)

    def starts() -> int:
        return len(read_history(run))

    def problem(processes: int) -> str:
        from vlm.training.fewer_devices import problem_of
        from vlm.training.run import experiment_in

        rows = [] if processes == most else read_history(run)
        return problem_of(experiment_in(run), rows, processes) if rows else ""

    code = Supervisor(
        Hosts(folder, process_id),
        fewest,
        most,
        local_addr or local_address(),
        rejoin_timeout,
        max_restarts,
        tuple(args),
        command,
        problem,
        progress,
        starts,
    ).run()
    if code:
        raise SystemExit(code)


def _check_command(args: list[str], run_dir: str) -> None:
    """Check that the run in a folder, if there is one, was started by the same command."""
    from vlm.paths import as_path, replace_text

    file = as_path(run_dir) / FOLDER / "command.json"
    before = json.loads(file.read_text()) if file.exists() else None
    if before != args and (as_path(run_dir) / "config.json").exists():
        command = "" if before is None else f", by vlm train {' '.join(before)}"
        raise UsageError(
            f"{run_dir} already holds a run{command}: resume it with vlm train --resume {run_dir}, "
            "or give another --run-dir"
        )
    replace_text(file, json.dumps(args))


def _value(args: list[str], option: str) -> str:
    """Return the value of an option, in `--run-dir RUN` or `--run-dir=RUN`; "" without it."""
    for arg, after in zip(args, [*args[1:], ""], strict=True):
        name, given, value = arg.partition("=")
        if name.replace("_", "-") == option:
            return value if given else after
    return ""


def _common(line: list[str]) -> list[str]:
    """Return the options of a command line that are of all commands: --import and --debug."""
    modules = _value(line, "--import")
    return [*(["--import", modules] if modules else []), *(["--debug"] * ("--debug" in line))]
