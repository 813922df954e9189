"""Mutated checkpoints: an exact load or one sentence.

    python tests/fuzz/checkpoints.py              # all 5,000
    python tests/fuzz/checkpoints.py --count 300  # a sample of them

Each case is a small golden checkpoint with a few bytes of one file changed, cut or doubled, or with
a value of its JSON replaced. It is loaded in a process that serves many cases, with a limit of time
and of memory; one that takes the process with it is found by its number. A load that succeeds gives
the parameters of the whole checkpoint, or, where no checksum guards a file, other numbers.
"""

import argparse
import collections
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time

GOLDEN = pathlib.Path(__file__).parents[1] / "weights" / "golden"
UNGUARDED = ("hf_clip", "model.safetensors")  # the format has no checksums
SECONDS, MEMORY = 30, 300e6  # of a case: processor time, and memory beyond twice the file
CHUNK = 500
FOUND = [517, 3502, 4254, 4261, 4273, 4515, 4977]  # these were faults once, and are always run

# What is loaded, the file of it that is changed, and how many of 5,000 cases it has.
TARGETS = [
    ("hf_clip_bin", "pytorch_model-00001-of-00002.bin", 700),
    ("openai_vit.pt", "openai_vit.pt", 800),
    ("hf_clip", "model.safetensors", 500),
    ("bundle", "model.safetensors", 300),
    ("bv_siglip", "model.npz", 700),
    ("hf_clip", "config.json", 700),
    ("oc_vit", "open_clip_config.json", 300),
    ("hf_clip", "tokenizer.json", 500),
    ("bundle", "bundle.json", 500),
]
ODD = [None, True, -1, 0, 1.5, 10**9, 2**63, 10**30, float("nan"), float("inf"), "", "x", [], {},
       [1], {"a": 1}, "../x", "\ud800", [[[[]]]]]  # fmt: skip


def mutate(data: bytes, name: str, chance: random.Random) -> bytes:
    """A few changes of a file, drawn by `chance`."""
    if name.endswith(".json") and chance.random() < 0.7:
        values = json.loads(data)
        for _ in range(chance.choice([1, 1, 2])):
            change_value(values, chance)
        return json.dumps(values).encode("utf-8", "surrogatepass")
    out = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        # The structure of these formats lies at their ends.
        size = len(out) or 1
        at = chance.choice([chance.randrange(size), chance.randrange(min(size, 4000)),
                            size - 1 - chance.randrange(min(size, 4000))])  # fmt: skip
        length = chance.choice([1, 2, 4, 8, 50])
        match chance.randrange(6):
            case 0:
                out[at : at + 1] = bytes([out[at] ^ (1 << chance.randrange(8))]) if out else b""
            case 1:
                out[at : at + length] = chance.randbytes(length)
            case 2:
                out[at : at + length] = chance.choice([b"\xff", b"\0", b"\x7f"]) * length
            case 3:
                del out[at : at + length]
            case 4:
                out[at:at] = out[at : at + chance.choice([1, 8, 500])]
            case 5:
                del out[chance.randrange(size) :]
    return bytes(out)


def change_value(values, chance: random.Random) -> None:
    """One value, at any depth, becomes another, goes, or gets another's place."""
    node, depth = values, chance.randrange(6)
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = chance.choice(keys)
        if depth == 0 or not isinstance(node[key], dict | list):
            break
        node, depth = node[key], depth - 1
    match chance.randrange(4):
        case 0 | 1:
            node[key] = chance.choice(ODD)
        case 2:
            del node[key]
        case 3:
            node[key] = node[chance.choice(keys)]


def changed(number: int) -> tuple[str, str, random.Random]:
    """The target of a case, and what draws its change."""
    total = sum(count for *_, count in TARGETS)
    place = number * 7919 % total  # a prime: any run of numbers has cases of every target
    for name, file, count in TARGETS:
        if place < count:
            return name, file, random.Random(number)
        place -= count
    raise AssertionError


def fingerprint(bundle) -> str:
    import numpy as np

    from vlm.weights.rules import flat_arrays

    digest = hashlib.sha256()
    for name, array in flat_arrays(bundle.model):
        digest.update(name.encode() + np.asarray(array).tobytes())
    return digest.hexdigest()


def prepare(root: pathlib.Path) -> None:
    """The whole checkpoints, as `load` takes them."""
    from vlm.bundle import load

    for name in ("hf_clip", "oc_vit", "bv_siglip"):
        shutil.copytree(GOLDEN / name, root / name)
    shutil.copytree(GOLDEN / "hf_clip", root / "hf_clip_bin")
    (root / "hf_clip_bin" / "model.safetensors").unlink()
    shutil.copytree(GOLDEN / "hf_clip_bin", root / "hf_clip_bin", dirs_exist_ok=True)
    (root / "openai_vit.pt").mkdir()
    shutil.copy(GOLDEN / "openai_vit.pt", root / "openai_vit.pt")
    load(GOLDEN / "hf_clip").save(root / "bundle")


def try_case(root: pathlib.Path, number: int, whole: dict[str, str]) -> str:
    """What became of a case: "exact", "refused", "other" for other numbers, or a fault."""
    from vlm.bundle import load
    from vlm.errors import VlmError

    name, file, chance = changed(number)
    path = root / name / file
    data = path.read_bytes()
    path.write_bytes(mutate(data, file, chance))
    before = sorted(str(p) for p in root.rglob("*"))
    memory, start = peak_memory(), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        bundle = load(path if path.suffix in (".pt", ".npz") else path.parent)
        bundle.tokenizer(["a photo of two cats", "[SEP] \u0130 <|endoftext|> ", ""])
        result = "exact" if fingerprint(bundle) == whole.get(name) else "other numbers"
    except VlmError as error:
        output = str(error)
        result = (
            "refused"
            if len(output) < 6000 and "\n" not in output
            else f"no sentence: {output[:300]}"
        )
        if name == "openai_vit.pt" and "49,408 tokens" in output:
            result = "exact"  # the golden file's own vocabulary is too small: read until there
    except TimeoutError:
        result = f"longer than {SECONDS} s"
    except BaseException as error:
        result = f"{type(error).__name__}: {str(error)[:200]!r}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        path.write_bytes(data)
    if sorted(str(p) for p in root.rglob("*")) != before:
        result = "wrote a file"
    grown = peak_memory() - memory
    if grown > 2 * len(data) + MEMORY:
        result = f"took {grown / 1e6:,.0f} MB"
    if result == "other numbers" and (name, file) == UNGUARDED:
        result = "other numbers, which nothing guards"
    return f"{name}/{file}\t{result}\t{time.process_time() - start:.2f}\t{grown}"


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def out_of_time(signum, frame):
    raise TimeoutError


def run_chunk(numbers: list[int], report: str) -> None:
    """Cases of one process, each noted before it begins and after it ends."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    signal.signal(signal.SIGPROF, out_of_time)
    from vlm.bundle import load

    with tempfile.TemporaryDirectory() as folder, open(report, "a", buffering=1) as out:
        root = pathlib.Path(folder)
        prepare(root)
        whole = {n: fingerprint(load(root / n)) for n in ("hf_clip", "oc_vit")}
        whole["bv_siglip"] = fingerprint(load(root / "bv_siglip" / "model.npz"))
        whole |= {"hf_clip_bin": whole["hf_clip"], "bundle": whole["hf_clip"]}
        for number in numbers:
            out.write(f"{number}\tbegun\n")
            out.write(f"{number}\t{try_case(root, number, whole)}\n")


def fuzz(numbers: list[int]) -> dict[int, list[str]]:
    """The outcome of each case; a process that dies costs the case it died in."""
    spawn = multiprocessing.get_context("spawn")
    outcomes: dict[int, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while left := [n for n in numbers if n not in outcomes]:
            report = os.path.join(folder, "report")
            pathlib.Path(report).write_text("")
            process = spawn.Process(target=run_chunk, args=(left[:CHUNK], report))
            process.start()
            process.join()
            lines = [line.split("\t") for line in pathlib.Path(report).read_text().splitlines()]
            ended = {int(line[0]): line[1:] for line in lines if len(line) == 5}
            outcomes |= ended
            if process.exitcode != 0:
                begun = [int(line[0]) for line in lines if line[1] == "begun"]
                died = [n for n in begun if n not in ended]
                if not died:
                    raise RuntimeError(f"a process ended with {process.exitcode} before its cases")
                outcomes[died[0]] = [
                    "/".join(changed(died[0])[:2]),
                    f"crash {process.exitcode}",
                    "0",
                    "0",
                ]
    return outcomes


FINE = ("exact", "refused", "other numbers, which nothing guards")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=sum(count for *_, count in TARGETS))
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    outcomes = fuzz(sorted({*range(options.first, options.first + options.count), *FOUND}))
    tally = collections.Counter(
        (file, result if result in FINE else "FAULT") for file, result, *_ in outcomes.values()
    )
    for (file, result), count in sorted(tally.items()):
        print(f"{file:48} {result:36} {count:6,}")
    print(f"slowest {max(float(o[2]) for o in outcomes.values()):.1f} s, "
          f"most memory {max(float(o[3]) for o in outcomes.values()) / 1e6:,.0f} MB")  # fmt: skip
    faults = {n: o for n, o in outcomes.items() if o[1] not in FINE}
    for number, (file, result, *_) in sorted(faults.items()):
        print(f"case {number}: {file}: {result}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
