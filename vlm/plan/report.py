"""A plan and a sweep as tables for the terminal; every figure beside how it came to be."""

from typing import get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlm.config import RematPolicy
from vlm.plan.plan import BASES, Plan


def show(plan: Plan, console: Console) -> None:
    """Print a plan."""
    e, mesh = plan.experiment, " x ".join(f"{a} {n}" for a, n in plan.mesh.items() if n > 1)
    console.print(
        f"[bold]{escape(e.name)}[/] on {plan.topology.name} ({plan.topology.chips} chips, mesh "
        f"{mesh or 'of one'}): batch {e.batch_size:,}, {e.dtype}, remat {e.remat}",
        highlight=False,
    )
    console.print(_memory(plan))
    console.print(_flops(plan))
    if plan.sent:
        console.print(_communication(plan))
    if plan.roofline:
        console.print(_time(plan))
    if plan.largest:
        found = plan.largest
        console.print(
            f"largest batch that fits: [bold]{found.batch_size:,}[/] with remat {found.remat} "
            f"({_size(found.peak)} per device; compiled, {len(found.tried)} tries)",
            highlight=False,
        )
    if not plan.fits:
        console.print(f"[bold red]This does not fit.[/] {_mend(plan)}", highlight=False)
    console.print(
        "\n".join(f"[dim]{name}: {meaning}[/]" for name, meaning in BASES.items()),
        highlight=False,
    )


def show_sweep(plans: list[Plan], console: Console) -> None:
    """Print plans side by side, the most pairs per second and chip first."""
    table = Table(
        "topology", "mesh", "remat", title="pairs per second and chip (a guess from the roofline)"
    )
    for name in ("batch", "memory", "of it", "sent", "step", "pairs/s", "per chip", "MFU"):
        table.add_column(name, justify="right")
    table.add_column("bound")
    table.add_column("basis")
    for p in sorted(plans, key=order):
        sizes = "x".join(str(n) for n in p.mesh.values())
        row = [p.topology.name, sizes, p.experiment.remat, f"{p.experiment.batch_size:,}"]
        row += [_size(p.memory.peak), _percent(p.memory.share), _size(sum(p.sent.values()))]
        if p.fits and p.roofline:
            per_chip = p.pairs_per_second / p.topology.chips
            row += [_time_of(p.step_seconds), f"{p.pairs_per_second:,.0f}", f"{per_chip:,.0f}"]
            row += [_percent(p.mfu), p.roofline.bound]
        else:
            row += ["", "", "", "", "does not fit" if not p.fits else ""]
        table.add_row(*row, p.memory.basis)
    console.print(table)


def order(plan: Plan) -> tuple:
    """Plans that fit first, the fastest per chip before the others."""
    rate = plan.pairs_per_second / plan.topology.chips if plan.roofline else 0.0
    return not plan.fits, -rate


def _memory(plan: Plan) -> Table:
    m = plan.memory
    table = Table("memory of one device", title=None)
    table.add_column("", justify="right")
    table.add_column("basis")
    table.add_row("parameters", _size(m.parameters), "compiled" if plan.collectives else "analytic")
    table.add_row("optimizer", _size(m.optimizer), "analytic")
    if m.averages:
        table.add_row("averages", _size(m.averages), "analytic")
    table.add_row("temporaries", _size(m.temporaries), m.basis)
    if m.activations is not None:
        table.add_row("  of which kept by the layers", _size(m.activations), m.basis)
    if m.loss is not None:
        table.add_row("  the loss, compiled alone", _size(m.loss), "compiled")
    table.add_row("[bold]peak[/]", f"[bold]{_size(m.peak)}[/]", m.basis)
    if m.limit:
        table.add_row(f"share of {_size(m.limit)}", _percent(m.share), m.basis)
    return table


def _flops(plan: Plan) -> Table:
    model = sum(p.model for p in plan.flops.values())
    executed = sum(p.executed for p in plan.flops.values())
    table = Table("FLOPs of a step (analytic)")
    for name in ("forward", "backward", "again", "share"):
        table.add_column(name, justify="right")
    for name, part in plan.flops.items():
        table.add_row(
            name,
            _flop(part.forward),
            _flop(part.backward),
            _flop(part.recomputed) if part.recomputed else "",
            _percent(part.executed / executed),
        )
    table.add_section()
    table.add_row(
        "[bold]all[/]", f"{_flop(model)} of the model", "", f"{_flop(executed)} executed", ""
    )
    return table


def _communication(plan: Plan) -> Table:
    if not plan.collectives:
        table = Table("communication (analytic)")
        table.add_column("sent by each device", justify="right")
        for place, sent in plan.sent.items():
            table.add_row(place, _size(sent))
        return table
    table = Table("communication (compiled)", "kind", "over")
    for name in ("runs", "bytes", "sent by each device"):
        table.add_column(name, justify="right")
    for c in plan.collectives:
        if c.sent < 1e-4 * sum(plan.sent.values()):
            continue
        axes = " x ".join(c.axes)
        table.add_row(c.place, c.kind, axes, f"{c.count:,}", _size(c.payload), _size(c.sent))
    return table


def _time(plan: Plan) -> Table:
    r = plan.roofline
    table = Table("time of a step")
    table.add_column("", justify="right")
    table.add_column("basis")
    table.add_row("arithmetic alone", _time_of(r.compute), r.basis)
    table.add_row("memory traffic alone", _time_of(r.memory), r.basis)
    table.add_row("communication alone", _time_of(r.interconnect), r.basis)
    table.add_row("operations, one by one", _time_of(r.operations), r.basis)
    table.add_row("communication that nothing hides", _time_of(r.exposed), r.basis)
    table.add_row(
        f"[bold]step, bound by {r.bound}[/]", f"[bold]{_time_of(r.predicted)}[/]", "guess"
    )
    table.add_row("pairs/s", f"{plan.pairs_per_second:,.0f}", "guess")
    per_chip = plan.pairs_per_second / plan.topology.chips
    table.add_row("pairs/s and chip", f"{per_chip:,.0f}", "guess")
    table.add_row("MFU", _percent(plan.mfu), "guess")
    return table


def _mend(plan: Plan) -> str:
    e = plan.experiment
    mends = []
    policies = get_args(RematPolicy)
    if e.remat != policies[-1]:
        mends.append(f"--remat {policies[policies.index(e.remat) + 1]}")
    if e.micro_batch_size is None:
        mends.append(f"--micro-batch-size {e.batch_size // 2}")
    if plan.mesh.get("fsdp", 1) == 1 and plan.topology.device_count > 1:
        mends.append("a mesh with fsdp")
    return f"Try {', '.join(mends)}, or a smaller batch." if mends else "Try a smaller batch."


def _size(n: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:,.2f} {unit}"
    return f"{n:.0f} B"


def _flop(n: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if n >= size:
            return f"{n / size:,.4g} {unit}FLOP"
    return f"{n:.0f} FLOP"


def _time_of(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
