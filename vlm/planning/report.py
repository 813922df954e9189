"""Tables of plans and sweeps for the terminal, with the basis of each figure.

`plan` is a `vlm.planning.Plan`, which uses these tables as its representation.
"""

from collections.abc import Callable, Iterator
from typing import Any, get_args

from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vlm import display
from vlm.config import RematPolicy
from vlm.planning.calibration import Range
from vlm.planning.needs import DECODES, Needs
from vlm.planning.roofline import Prediction, Roofline

# What the figures of a plan are based on.
BASES = {
    "compiled": "read from the program compiled for this slice",
    "analytic": "estimated analytically (no compilation) from the chip's published figures",
    "estimate": "from round figures listed in vlm/planning/needs.py",
    "expected": "a range, from the fraction of published rates that similar steps reached",
}


def show(plan: Any, console: Console, price: float | None = None) -> None:
    """Print a plan; with the price of a chip-hour, also the cost."""
    for part in parts(plan, price):
        console.print(part)


def parts(plan: Any, price: float | None = None) -> Iterator[RenderableType]:
    """Yield the lines and tables of a plan."""
    e, mesh = plan.experiment, " x ".join(f"{a} {n}" for a, n in plan.mesh.items() if n > 1)
    yield Text.from_markup(
        f"[bold]{escape(e.name)}[/] on {plan.topology.name} ({plan.topology.chips} chips, mesh "
        f"{mesh or 'of 1'}): batch {e.batch_size:,}, {e.dtype}, remat {e.remat}, "
        f"blocks {'in a loop' if e.scan else 'unrolled'}"
    )
    if plan.sizes:
        yield _shapes(plan)
        largest = max(plan.sizes, key=lambda p: p.memory.peak).experiment
        if len(plan.sizes) > 1:
            yield Text(f"memory, FLOPs and roofline: of {_shape(largest)}")
    yield _memory(plan)
    yield _flops(plan)
    if plan.sent:
        yield _communication(plan)
    if plan.roofline and plan.prediction:
        yield _time(plan.roofline, plan.prediction)
        if needed := plan.needs(price):
            yield _needs(needed)
        if needed and needed.data_bound and needed.cores_limit:
            yield Text.from_markup(
                f"[bold red]Data-bound.[/] A host has {needed.cores_limit:.0f} cores, which decode "
                f"about {needed.cores_limit * DECODES:,.0f} images/s; its chips consume "
                f"{_of(needed.images_per_second, _count)}: prepare smaller images, or rent more "
                "cores per chip (vlm bench data measures)."
            )
    if largest := plan.largest:
        more = "" if largest.exact else "; a larger one may fit"
        yield Text.from_markup(
            f"largest batch that fits: [bold]{largest.batch_size:,}[/] with remat {largest.remat} "
            f"({_size(largest.peak)} per device; {largest.basis}, {len(largest.tried)} tries{more})"
        )
    if not plan.fits:
        yield Text.from_markup(f"[bold red]This does not fit.[/] {_suggestions(plan)}")
    yield Text("\n".join(f"{name}: {meaning}" for name, meaning in BASES.items()), style="dim")


def show_sweep(plans: list[Any], console: Console, price: float | None = None) -> None:
    """Print plans by pairs per second and chip, compiled and analytic ones in separate tables.

    With the price of a chip-hour, they have the cost of the run.
    """
    for compiled, title in ((True, "compiled"), (False, "analytic estimates")):
        rows = sorted((p for p in plans if p.compiled == compiled), key=order)
        if rows:
            console.print(_sweep_table(rows, title, price, wide=console.width >= 100))
    console.print(f"[dim]expected: {BASES['expected']}[/]", highlight=False)


def order(plan: Any) -> tuple:
    """Sort key: compiled plans first, then those that fit, then by speed per chip."""
    rate = plan.prediction.pairs_per_second_per_chip.middle if plan.prediction else 0.0
    return not plan.compiled, not plan.fits, -rate


def _sweep_table(plans: list[Any], title: str, price: float | None, *, wide: bool) -> Table:
    names = ["topology", "mesh", "remat", "batch", "mem", "step", "a chip"]
    names += ["MFU"] if wide or price is None else []
    names += ["sent", "pairs/s", "bound"] if wide else []
    names += [] if price is None else ["cost"]
    table = display.number_table(*names, text=3)
    for name, column in zip(names, table.columns, strict=True):
        column.no_wrap = True
        column.justify = "left" if name == "bound" else column.justify
    table.title, table.box = f"{title}, by pairs per second and chip", box.SIMPLE_HEAD
    table.pad_edge, table.padding = False, (0, 1, 0, 0)
    for p in plans:
        row = {
            "topology": p.topology.name,
            "mesh": "x".join(str(n) for n in p.mesh.values()),
            "remat": p.experiment.remat,
            "batch": _short(p.experiment.batch_size),
            "mem": f"{p.memory.share:.0%}" if p.memory.share else _size(p.memory.peak),
            "step": "" if p.fits else "too large",
            "sent": _size(sum(p.sent.values())),
            "bound": p.roofline.bound if p.roofline else "",
        }
        if prediction := p.prediction:
            row["step"] = _of(prediction.step_seconds, _short_time, "-")
            row["a chip"] = _of(prediction.pairs_per_second_per_chip, _short, "-")
            row["MFU"] = _of(prediction.mfu, "{:.0%}".format, "-")
            row["pairs/s"] = _of(prediction.pairs_per_second, _count, "-")
        if (needed := p.needs(price)) and needed.cost:
            row["cost"] = _of(needed.cost, _count, "-")
        table.add_row(*(row.get(name, "") for name in names))
    return table


def _shapes(plan: Any) -> Table:
    """Table of the shapes of a batch: each is a program of its own."""
    table = display.number_table("batches", "peak", "step", "pairs/s")
    distinct = {id(p): p for p in plan.sizes}  # a length may be listed twice
    for p in (*distinct.values(), *plan.texts):
        row = [_shape(p.experiment), _size(p.memory.peak)]
        if prediction := p.prediction:
            row += [_of(prediction.step_seconds, _time_of)]
            row += [_of(prediction.pairs_per_second, _count)]
        table.add_row(*row)
    if plan.texts:
        table.caption = (
            "a step with text_lengths is between those of its shortest and longest texts, which a "
            "plan does not read"
        )
    return table


def _shape(e: Any) -> str:
    patches = e.preprocess.max_patches
    images = f"images of {patches:,} patches, " if patches else ""
    return f"{e.batch_size:,} pairs: {images}texts of {e.model.text.context_length} tokens"


def _memory(plan: Any) -> Table:
    m = plan.memory
    table = _basis_table("memory of one device")
    for name, size, basis in (
        ("parameters", m.parameters, "compiled" if plan.collectives else "analytic"),
        ("optimizer", m.optimizer, "analytic"),
        ("EMA", m.averages or None, "analytic"),
        ("the teacher's parameters", m.teacher or None, "analytic"),
        ("temporaries", m.temporaries, m.basis),
        ("  of which saved by the layers", m.activations, m.basis),
        ("  of the loss, compiled separately", m.loss, "compiled"),
    ):
        if size is not None:
            table.add_row(name, _size(size), basis)
    table.add_row("[bold]peak[/]", f"[bold]{_size(m.peak)}[/]", m.basis)
    if m.limit:
        table.add_row(f"share of {_size(m.limit)} usable", _percent(m.share), m.basis)
    return table


def _flops(plan: Any) -> Table:
    executed = sum(p.executed for p in plan.flops.values())
    names = ("FLOPs of a step (analytic)", "forward", "backward", "recomputed", "share")
    table = display.number_table(*names)
    for name, p in plan.flops.items():
        again = _flop(p.recomputed) if p.recomputed else ""
        share = _percent(p.executed / executed)
        table.add_row(name, _flop(p.forward), _flop(p.backward), again, share)
    table.add_section()
    table.add_row("[bold]model FLOPs[/]", _flop(sum(p.model for p in plan.flops.values())))
    table.add_row("[bold]executed FLOPs (with recomputation)[/]", _flop(executed))
    return table


def _communication(plan: Any) -> Table:
    if not plan.collectives:
        table = display.number_table("communication (analytic)", "sent by each device")
        for place, sent in plan.sent.items():
            table.add_row(place, _size(sent))
        return table
    names = ("communication (compiled)", "kind", "over", "runs", "sent")
    table = display.number_table(*names, text=3)
    for c in plan.collectives:
        if c.sent >= 1e-4 * sum(plan.sent.values()):
            axes = "slices" if c.between_slices else " x ".join(c.axes)
            kind = f"{c.kind}, overlapped" if c.overlapped else c.kind
            table.add_row(c.place, kind, axes, f"{c.count:,}", _size(c.sent))
    return table


def _time(r: Roofline, expected: Prediction) -> Table:
    table = _basis_table("time of a step")
    table.add_row("arithmetic", _time_of(r.compute), r.basis)
    table.add_row("memory traffic", _time_of(r.memory), r.basis)
    table.add_row("communication", _time_of(r.interconnect), r.basis)
    table.add_row("instructions in sequence", _time_of(r.operations), r.basis)
    table.add_row("exposed communication", _time_of(r.exposed), r.basis)
    if r.compiler_estimate is not None:
        table.add_row("the compiler's estimate", _time_of(r.compiler_estimate), r.basis)
    if r.layout_share is not None:
        share = _percent(r.layout_share)
        table.add_row("  share of copies and layout changes", share, r.basis)
    step = f"[bold]{_of(expected.step_seconds, _time_of)}[/]"
    table.add_row(f"[bold]step, bound by {r.bound}[/]", step, "expected")
    table.add_row("pairs/s", _of(expected.pairs_per_second, _count), "expected")
    per_chip = _of(expected.pairs_per_second_per_chip, _count)
    table.add_row("pairs/s per chip", per_chip, "expected")
    table.add_row("MFU", _of(expected.mfu, _percent), "expected")
    table.caption = expected.evidence
    return table


def _needs(n: Needs) -> Table:
    table = _basis_table("the run")
    if n.seconds:
        name = f"time to {n.examples:,} examples" if n.examples else "time"
        table.add_row(name, _of(n.seconds, long_time), "expected")
    if n.chip_hours:
        table.add_row("chip-hours", _of(n.chip_hours, _count), "expected")
    if n.cost:
        table.add_row("cost", _of(n.cost, _count), "expected")
    table.add_row("checkpoint", _size(n.checkpoint_bytes), "analytic")
    table.add_row("  write time, during training", _time_of(n.checkpoint_seconds), "estimate")
    table.add_section()
    of = f" of {_size(n.host_memory_limit)}" if n.host_memory_limit else ""
    hosts = f"{n.hosts} hosts, each" if n.hosts > 1 else "the host"
    table.add_row(f"{hosts}: memory", f"{_size(n.host_memory)}{of}", "estimate")
    table.add_row("  images/s", _of(n.images_per_second, _count), "expected")
    table.add_row("  MB/s", _of(n.bytes_per_second.scaled(1e-6), _count), "estimate")
    of = f" of {n.cores_limit:.0f}" if n.cores_limit else ""
    table.add_row("  cores", f"{_of(n.cores, _count)}{of}", "estimate")
    return table


def _basis_table(title: str) -> Table:
    """Make an empty table of names, values and the basis of each."""
    table = display.number_table(title, "")
    table.add_column("basis")
    return table


def _of(value: Range, text: Callable[[float], str], to: str = " to ") -> str:
    """Format a range such as "137 to 206 ms", with a shared unit once."""
    low, high = text(value.low), text(value.high)
    if low == high:
        return low
    number, _, unit = low.partition(" ")
    shared = unit and high.endswith(f" {unit}")
    return f"{number if shared else low.removesuffix('%')}{to}{high}"


def _suggestions(plan: Any) -> str:
    e = plan.experiment
    options = []
    policies = get_args(RematPolicy)
    if e.remat in policies[:-1]:
        options.append(f"--remat {policies[policies.index(e.remat) + 1]}")
    if e.micro_batch_size is None:
        options.append(f"--micro-batch-size {e.batch_size // 2}")
    if plan.mesh.get("fsdp", 1) == 1 and plan.topology.device_count > 1:
        options.append("a mesh with fsdp")
    return f"Try {', '.join(options)}, or a smaller batch." if options else "Try a smaller batch."


def _size(n: float) -> str:
    return _scaled(n, {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}, ",.2f") or f"{n:.0f} B"


def _flop(n: float) -> str:
    units = {"PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}
    return _scaled(n, units, ",.4g") or f"{n:.0f} FLOP"


def _scaled(n: float, units: dict[str, float], form: str) -> str:
    """Format a number in the largest unit that it reaches; empty if it reaches none."""
    return next((f"{n / size:{form}} {unit}" for unit, size in units.items() if n >= size), "")


def _time_of(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def long_time(seconds: float) -> str:
    """Format a duration in days, hours, minutes or seconds."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def _count(n: float) -> str:
    return f"{n:,.0f}" if n >= 10 else f"{n:.2g}"


def _short_time(seconds: float) -> str:
    number, unit = (seconds, "s") if seconds >= 1 else (1e3 * seconds, "ms")
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


def _short(n: float) -> str:
    return f"{n / 1e3:,.0f}k" if n >= 10_000 else _count(n)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
