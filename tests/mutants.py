"""Are the tests strong enough? Small faults are put into the code, and each should be noticed.

    python tests/mutants.py                      all named modules, 40 mutants each
    python tests/mutants.py losses/ring.py --count 0 --seed 1    all mutants of one module

A mutant is a copy of the tree with one operator, constant, condition or statement changed. It is
killed if the tests of its module fail or take far longer than they did: first those of its own
test file, then those of its room. What survives is printed with its line, to be looked at: a
missing test, or a change that changes nothing. The table at the end has a row for each module.
"""

import argparse
import ast
import copy
import math
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent
# What is tested, and by which tests.
SUBJECTS = {
    "losses": ["tests/losses"],
    "heads": ["tests/heads"],
    "train/step.py": [
        "tests/train/test_step.py",
        "tests/train/test_masking.py",
        "tests/train/test_optimizer.py",
        "tests/train/test_resolution_schedule.py",
    ],
    "data/pipeline.py": ["tests/data"],
    "weights/rules.py": ["tests/weights/test_rules.py", "tests/weights/test_golden.py"],
}
# The test file that is nearest to a module, where it is not the one of the same name.
NEAREST = {
    "losses/contrastive.py": "losses/test_contrastive.py",
    "losses/ring.py": "losses/test_contrastive.py",
    "losses/sigmoid.py": "losses/test_contrastive.py",
    "losses/softmax.py": "losses/test_contrastive.py",
    "heads/calibration.py": "heads/test_few_shot.py",
    "heads/codes.py": "heads/test_index.py",
    "heads/identity.py": "heads/test_index.py",
    "heads/index_folder.py": "heads/test_index.py",
    "heads/inputs.py": "heads/test_retrieval.py",
    "heads/items.py": "heads/test_index.py",
    "heads/linear_probe.py": "heads/test_few_shot.py",
    "heads/metadata.py": "heads/test_retrieval.py",
    "heads/prompted.py": "adapt/test_learned_prompt.py",
    "heads/prompt_rows.py": "adapt/test_learned_prompt.py",
    "heads/prompts.py": "heads/test_zero_shot.py",
    "heads/top_k.py": "heads/test_retrieval.py",
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
SLOWER, LEAST = 4.0, 60.0  # a mutant that takes so many times as long, or these seconds, hangs


def places(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Every (node, what to do with it) that makes a mutant of `tree`.

    Left out: docstrings, annotations, messages of errors, decorators and what only displays.
    """

    def walk(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr):
            return
        if isinstance(node, ast.FunctionDef) and node.name in ("__repr__", "_repr_html_"):
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


def mutants(source: str) -> list[tuple[int, str, str]]:
    """(line, what was changed, mutated source) of every mutant."""
    count, found = len(list(places(ast.parse(source)))), []
    for number in range(count):
        tree = ast.parse(source)
        node, how = list(places(tree))[number]
        before = ast.unparse(node).splitlines()[0]
        apply(tree, node, how)
        after = ast.unparse(node).splitlines()[0] if how != "delete" else "pass"
        found.append((node.lineno, f"{before}  ->  {after}", ast.unparse(tree)))
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


def run(tree: pathlib.Path, tests: list[str], limit: float) -> tuple[bool, float]:
    """Whether the tests pass in a copy of the tree, and the seconds they took.

    The tests run in a fork of this process, which has JAX imported but not started.
    """
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.environ["PYTHONPATH"] = str(tree)
        import pytest

        code = 1
        try:
            code = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests])
        finally:
            os._exit(int(code != 0))
    while time.monotonic() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0, time.monotonic() - began
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False, limit


def tests_of(subject: str, name: str) -> list[list[str]]:
    """The tests of a module in rounds, the nearest first: a mutant that one round kills is dead."""
    own = (
        ROOT / "tests" / NEAREST.get(name, f"{name.rpartition('/')[0]}/test_{name.split('/')[-1]}")
    )
    nearest = [str(own.relative_to(ROOT))]
    return [nearest, SUBJECTS[subject]] if own.exists() else [SUBJECTS[subject]]


class Runner:
    """Runs tests in a copy of the tree, each set of them no longer than it may take."""

    def __init__(self, tree: pathlib.Path):
        self.tree, self._limits = tree, {}

    def passes(self, tests: list[str]) -> bool:
        return run(self.tree, tests, self._limits[tuple(tests)])[0]

    def learn(self, tests: list[str]) -> None:
        """Have them run without any fault, once, to know how long they take."""
        if tuple(tests) not in self._limits:
            run(self.tree, tests, 3600)  # fills the cache of compiled programs
            well, seconds = run(self.tree, tests, 3600)
            if not well:
                sys.exit(f"{' '.join(tests)} fail without any fault")
            self._limits[tuple(tests)] = max(LEAST, SLOWER * seconds)

    def survives(self, target: pathlib.Path, mutated: str, rounds: list[list[str]]) -> bool:
        """Whether every round of tests passes with the mutated source in place."""
        source = target.read_text()
        for tests in rounds:
            self.learn(tests)
            target.write_text(mutated)
            try:
                if not self.passes(tests):
                    return False
            finally:
                target.write_text(source)
        return True


def examine(
    runner: Runner, subject: str, path: pathlib.Path, count: int, seed: int, until: float
) -> tuple[int, int]:
    """(killed, tried) of a module's mutants; fewer are tried where the time ends."""
    name = str(path.relative_to(ROOT / "vlm"))
    found = mutants(path.read_text())
    if count and len(found) > count:
        found = random.Random(f"{seed} {name}").sample(found, count)
    killed = tried = 0
    for line, what, mutated in found:
        if time.monotonic() > until:
            break
        alive = runner.survives(runner.tree / "vlm" / name, mutated, tests_of(subject, name))
        tried, killed = tried + 1, killed + (not alive)
        if alive:
            print(f"survived  vlm/{name}:{line}  {what}", flush=True)
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
        import pytest  # noqa: F401

        tree = pathlib.Path(scratch) / "tree"
        ignore = shutil.ignore_patterns("__pycache__", ".*", "runs")
        shutil.copytree(ROOT, tree, ignore=ignore)
        runner = Runner(tree)
        for subject in SUBJECTS:
            place = ROOT / "vlm" / subject
            for path in [place] if place.is_file() else sorted(place.glob("*.py")):
                name = str(path.relative_to(ROOT / "vlm"))
                if path.name == "__init__.py" or (options.modules and name not in options.modules):
                    continue
                result = examine(runner, subject, path, options.count, options.seed, until)
                rows += [(name, *result)] if result[1] else []
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    print(f"\n{'module':<28}{'mutants':>9}{'killed':>9}")
    for name, killed, tried in rows:
        print(f"{name:<28}{tried:>9}{killed:>9}{killed / max(tried, 1):>8.0%}")


if __name__ == "__main__":
    main()
