"""Are the tests strong enough? Small faults are put into the code, and each should be noticed.

    python tests/mutants.py                      all named modules, 40 mutants each
    python tests/mutants.py losses/ring.py --count 0 --seed 1    all mutants of one module

A mutant is a copy of the tree with one operator, constant, condition or statement changed. First
the tests run without a fault, and it is noted which of them run which statements. A mutant meets
the test files that run its statement, those tests first; where none does, as of a constant, the
files that run anything of its module. It is killed if a test fails or takes far longer than it did.
What survives is printed with its line, to be looked at: a missing test, or a change that changes
nothing. The table at the end has a row for each module.
"""

import argparse
import ast
import builtins
import collections
import copy
import json
import math
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# What is tested, and by which tests.
SUBJECTS = {
    "losses": ["tests/losses"],
    "heads": ["tests/heads", "tests/adaptation/test_learned_prompt.py"],
    "training/step.py": [
        "tests/training/test_step.py",
        "tests/training/test_masking.py",
        "tests/training/test_optimizer.py",
        "tests/training/test_resolution_schedule.py",
        "tests/training/test_objectives.py",
    ],
    "data/pipeline.py": ["tests/data"],
    "weights/rules.py": [
        "tests/weights/test_rules.py",
        "tests/weights/test_golden.py",
        "tests/weights/test_writing.py",
    ],
}
SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
DISPLAYS = ("__repr__", "_repr_html_", "__rich__")
SLOWER, LEAST = 4.0, 60.0  # a mutant that takes so many times as long, or these seconds, hangs
WAITING = 5  # seconds of the clock to each of a core: other work, and what waits for ever


def places(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Every (node, what to do with it) that makes a mutant of `tree`.

    Left out: docstrings, annotations, messages of errors, decorators and what only displays; and
    the `strict=True` of a zip, an assertion that holds whatever a caller does.
    """

    def walk(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr):
            return
        if isinstance(node, ast.FunctionDef) and node.name in DISPLAYS:
            return
        if isinstance(node, ast.keyword) and ast.unparse(node) == "strict=True":
            return
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
            yield node, "swap"
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield node, "swap"
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield node, "drop"
        if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            yield node, "change"
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            yield node, "negate"
        if isinstance(node, ast.AugAssign) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ):
            yield node, "delete"
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from walk(child)

    yield from walk(tree)


def statements(tree: ast.Module) -> dict[ast.AST, int]:
    """The line of the statement that each node belongs to; 0 outside of functions.

    The defaults of a function belong to its first statement: they matter where it is called.
    """
    lines = {}

    def walk(node: ast.AST, line: int, inside: bool) -> None:
        if isinstance(node, ast.stmt):
            line = node.lineno if inside else 0
        lines[node] = line
        function = isinstance(node, ast.FunctionDef)
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    header = function and name != "body"
                    walk(child, _first(node).lineno if header else line, inside or function)

    walk(tree, 0, False)
    return lines


def _first(function: ast.FunctionDef) -> ast.stmt:
    """The first statement of a function that is no docstring."""
    documented = ast.get_docstring(function) is not None and len(function.body) > 1
    return function.body[int(documented)]


def watched(source: str, name: str) -> str:
    """The module with a note before every statement of its functions, for `Recorder`."""
    tree = ast.parse(source)

    def note(node: ast.AST, inside: bool) -> None:
        inside = inside or isinstance(node, ast.FunctionDef)
        for field, value in list(ast.iter_fields(node)):
            if not (isinstance(value, list) and value and isinstance(value[0], ast.AST)):
                continue
            for child in value:
                note(child, inside)
            if inside and isinstance(value[0], ast.stmt):
                notes = [(ast.parse(f"_ran({name!r}, {s.lineno})").body[0], s) for s in value]
                if isinstance(node, ast.FunctionDef) and _first(node) is not value[0]:
                    notes[0] = (value[0],)  # a docstring stays in front
                setattr(node, field, [statement for pair in notes for statement in pair])

    note(tree, False)
    start = "import builtins\n_ran = getattr(builtins, '_ran', lambda *place: None)"
    tree.body[1:1] = ast.parse(start).body  # after the docstring
    return ast.unparse(ast.fix_missing_locations(tree))


class Recorder:
    """A plugin of pytest: which tests run which statements, and how long they take, to a file."""

    def __init__(self, file: pathlib.Path):
        self.file, self.test = file, ""
        self.failed = []
        self.ran = collections.defaultdict(set)
        self.seconds = collections.Counter()
        builtins._ran = lambda name, line: self.ran[f"{name}:{line}"].add(self.test)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.test, began = item.nodeid, time.process_time()
        result = yield
        self.seconds[item.nodeid.partition("::")[0]] += time.process_time() - began
        return result

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(f"{report.nodeid}\n{report.longreprtext}")

    def pytest_sessionfinish(self):
        ran = {place: sorted(tests - {""}) for place, tests in self.ran.items()}
        self.file.write_text(json.dumps([ran, self.seconds, self.failed]))


class First:
    """A plugin of pytest: these tests before the others."""

    def __init__(self, tests: list[str]):
        self.tests = set(tests)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: item.nodeid not in self.tests)


def mutants(source: str) -> list[tuple[int, str, int, str]]:
    """(line, what was changed, line of its statement, mutated source) of every mutant."""
    count, found = len(list(places(ast.parse(source)))), []
    for number in range(count):
        tree = ast.parse(source)
        node, how = list(places(tree))[number]
        statement = statements(tree)[node]
        before = ast.unparse(node).splitlines()[0]
        apply(tree, node, how)
        after = ast.unparse(node).splitlines()[0] if how != "delete" else "pass"
        found.append((node.lineno, f"{before}  ->  {after}", statement, ast.unparse(tree)))
    return found


def apply(tree: ast.Module, node, how: str) -> None:
    if how == "swap" and isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif how == "swap":
        node.op = SWAPS[type(node.op)]()
    elif how == "drop":
        node.op = ast.UAdd() if isinstance(node.op, ast.USub) else node.op
        if isinstance(node.op, ast.Not):
            node.operand = ast.UnaryOp(ast.Not(), node.operand)
    elif how == "negate":
        node.test = ast.UnaryOp(ast.Not(), copy.deepcopy(node.test))
    elif how == "change" and type(node.value) is bool:
        node.value = not node.value
    elif how == "change":
        node.value = node.value + 1 if type(node.value) is int else node.value * 2 + 0.1
    elif how == "delete":
        for parent in ast.walk(tree):
            for _, body in ast.iter_fields(parent):
                if isinstance(body, list) and node in body:
                    body[body.index(node)] = ast.copy_location(ast.Pass(), node)
    ast.fix_missing_locations(tree)


def run(tree: pathlib.Path, tests: list[str], limit: float, plugin: object) -> str:
    """How the tests end in a copy of the tree: "well", "badly" or "late".

    They run in a fork of this process, which has JAX imported but not started, for at most
    `limit` seconds of a core.
    """
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.environ["PYTHONPATH"] = str(tree)
        code = 1
        try:
            options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
            code = pytest.main([*options, *tests], plugins=[plugin])
        finally:
            os._exit(int(code != 0))
    while time.monotonic() - began < WAITING * limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (
                signal.SIGXCPU,
                signal.SIGKILL,
            )
            return "late" if late else "badly" if status else "well"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "late"


class Tests:
    """The tests of a subject in a copy of the tree, and what they run when there is no fault."""

    def __init__(self, tree: pathlib.Path, tests: list[str], modules: list[str]):
        self.tree = tree
        sources = {tree / "vlm" / name: (tree / "vlm" / name).read_text() for name in modules}
        for name, (file, source) in zip(modules, sources.items(), strict=True):
            file.write_text(watched(source, name))
        try:
            notes = tree / "notes.json"
            end = run(tree, tests, 36_000, Recorder(notes))
            self.ran, self.seconds, failed = json.loads(notes.read_text())
            if end != "well":
                sys.exit("\n".join([*failed, f"{' '.join(tests)} fail without any fault"]))
        finally:
            for file, source in sources.items():
                file.write_text(source)

    def of(self, name: str, statement: int) -> tuple[list[str], list[str]]:
        """The tests that run a statement of a module, and the files to run, the nearest first."""
        own = self.ran.get(f"{name}:{statement}", [])
        counts = collections.Counter(
            test.partition("::")[0]
            for place, tests in self.ran.items()
            if place.startswith(f"{name}:")
            for test in tests
        )
        chosen = {test.partition("::")[0] for test in own} or set(self.seconds)
        return own, [file for file, _ in counts.most_common() if file in chosen]

    def end(self, name: str, mutated: str, statement: int) -> str:
        """How the tests end with the mutated source in place."""
        own, files = self.of(name, statement)
        limit = max(LEAST, SLOWER * sum(self.seconds[file] for file in files))
        target = self.tree / "vlm" / name
        source = target.read_text()
        target.write_text(mutated)
        try:
            return run(self.tree, files, limit, First(own))
        finally:
            target.write_text(source)


def examine(tests: Tests, name: str, count: int, seed: int, until: float) -> tuple[int, int]:
    """(killed, tried) of a module's mutants; fewer are tried where the time ends."""
    found = mutants((tests.tree / "vlm" / name).read_text())
    if count and len(found) > count:
        found = random.Random(f"{seed} {name}").sample(found, count)
    killed = tried = 0
    for line, what, statement, mutated in found:
        if time.monotonic() > until:
            break
        end = tests.end(name, mutated, statement)
        tried, killed = tried + 1, killed + (end != "well")
        if end != "badly":
            output = "survived" if end == "well" else "too slow"
            where = "" if tests.of(name, statement)[0] or not statement else "  (no test runs it)"
            print(f"{output}  vlm/{name}:{line}  {what}{where}", flush=True)
    print(f"{name}: {killed} of {tried} killed", flush=True)
    return killed, tried


def main() -> None:
    parser = argparse.ArgumentParser(description="Put small faults into modules, one at a time.")
    parser.add_argument("modules", nargs="*", help="such as losses/ring.py; all subjects if none")
    parser.add_argument("--count", type=int, default=40, help="mutants of a module; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after so many")
    options = parser.parse_args()

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["HYPOTHESIS_PROFILE"] = "default"
    sys.dont_write_bytecode = True
    until, rows = time.monotonic() + 60 * options.minutes, []
    with tempfile.TemporaryDirectory() as scratch:
        # Programs that a fault does not touch are compiled once.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{scratch}/xla"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        import flax.nnx  # noqa: F401 (imported once, before the forks)
        import jax  # noqa: F401
        import optax  # noqa: F401

        tree = pathlib.Path(scratch) / "tree"
        ignore = shutil.ignore_patterns("__pycache__", ".*", "runs")
        shutil.copytree(ROOT, tree, ignore=ignore)
        for subject, paths in SUBJECTS.items():
            place = ROOT / "vlm" / subject
            found = [place] if place.is_file() else sorted(place.glob("*.py"))
            names = [str(path.relative_to(ROOT / "vlm")) for path in found]
            names = [n for n in names if not n.endswith("__init__.py")]
            chosen = [n for n in names if not options.modules or n in options.modules]
            if not chosen or time.monotonic() > until:
                continue
            tests = Tests(tree, paths, names)
            for name in chosen:
                result = examine(tests, name, options.count, options.seed, until)
                rows += [(name, *result)] if result[1] else []
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    print(f"\n{'module':<28}{'mutants':>9}{'killed':>9}")
    for name, killed, tried in rows:
        print(f"{name:<28}{tried:>9}{killed:>9}{killed / max(tried, 1):>8.0%}")


if __name__ == "__main__":
    main()
