"""`vlm adapt`: an honest split, tries within a budget, a choice, a folder that everything takes."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from vlm.adaptation import budgeted, fine_tuning
from vlm.adaptation.budgeted import adapt
from vlm.adaptation.cost import Estimate, OverBudget, ResourceMeter, TimeBudget, measured
from vlm.adaptation.labelled import (
    Labelled,
    hold_out,
    pick_shots,
    read_labelled,
    with_names,
    write_table,
)
from vlm.bundle import load
from vlm.cli import main
from vlm.config import DataConfig
from vlm.data.duplicates import copied_from
from vlm.data.sources import open_source
from vlm.errors import ConfigError, DataError
from vlm.heads.saved import load_classifier
from vlm.heads.zero_shot import FILE

EACH = 6
TEACHER = Path(__file__).parent.parent / "weights" / "golden" / "hf_clip"


def draw(folder: Path, each: int, seed: int, cast: int = 0) -> Path:
    """A folder of noisy squares for each colour."""
    rng = np.random.default_rng(seed)
    for colour, rgb in tiny.COLOURS.items():
        (folder / f"a {colour} square").mkdir(parents=True)
        for i in range(each):
            pixels = np.full((24, 24, 3), 255 - cast, np.float32)
            at = rng.integers(0, 6, 2)
            pixels[at[0] : at[0] + 17, at[1] : at[1] + 17] = np.roll(rgb, cast)
            pixels += 30 * rng.standard_normal(pixels.shape)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                folder / f"a {colour} square" / f"{i}.png"
            )
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    return {
        "train": draw(root / "train", EACH, 0, cast=1),
        "test": draw(root / "test", 8, 1, cast=1),
        "far": draw(root / "far", 4, 2),
    }


@pytest.fixture(scope="module")
def model():
    return load(tiny.run())


def test_the_split_is_even_the_same_each_time_and_apart(places):
    data = read_labelled(str(places["train"]))
    assert data.names == ("a blue square", "a green square", "a red square")
    train, held = hold_out(data, seed=3)
    again = hold_out(data, seed=3)[1]
    assert held.images == again.images
    assert held.images != hold_out(data, seed=4)[1].images
    assert sorted(map(str, [*train.images, *held.images])) == sorted(map(str, data.images))
    np.testing.assert_array_equal(np.bincount(held.target), [1, 1, 1])
    few = data.take(pick_shots(data, 2))
    np.testing.assert_array_equal(np.bincount(few.target), [2, 2, 2])
    train, held = hold_out(few)
    np.testing.assert_array_equal(np.bincount(train.target), np.bincount(held.target))
    with pytest.raises(DataError, match="one image of each class"):
        hold_out(data.take(pick_shots(data, 1)))


def with_copies(places, root):
    """The training images, each also as a JPEG of 75 and at double the size; one in two classes."""
    files = sorted(Path(places["train"]).rglob("*.png"))
    for file in files:
        folder = root / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.open(file)
        image.save(folder / f"{file.stem}.png")
        image.save(folder / f"{file.stem}-copy.jpg", quality=95, subsampling=0)
        image.resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{file.stem}-large.png")
    Image.open(files[0]).save(root / files[-1].parent.name / "wrong.png")
    return root


def test_copies_stay_on_one_side_of_a_split(places, tmp_path):
    data = read_labelled(str(with_copies(places, tmp_path / "copies")))
    assert len(data) == 3 * 3 * EACH + 1
    assert len(set(data.groups.tolist())) == 3 * EACH
    for seed in range(5):
        train, held = hold_out(data, seed=seed)
        assert len(train) + len(held) == len(data)
        assert not copied_from(held.thumbnails, train.thumbnails).any()
        assert (np.bincount(held.target, minlength=3) > 0).all()
        assert len(held) <= 0.3 * len(data)
        few = data.take(pick_shots(data, 4, seed))
        np.testing.assert_array_equal(np.bincount(few.target), [4, 4, 4])
        for number in range(3):
            assert len({*few.groups[few.target == number].tolist()}) == 4
    only_copies = data.take(np.flatnonzero(np.isin(data.groups, data.groups[:1])))
    with pytest.raises(DataError, match="copies of it aside"):
        hold_out(only_copies)


def test_an_adaptation_says_what_is_copied(model, places, tmp_path, caplog):
    data = read_labelled(str(with_copies(places, tmp_path / "copies")))
    test = read_labelled(str(places["test"]))
    leaked = Labelled([*test.images, *data.images[:2]], np.r_[test.target, data.target[:2]],
                      test.names, test.data)  # fmt: skip
    made = adapt(model, data, tmp_path / "runs", 60, ["probe"], test=leaked)
    copies = made.about["copies"]
    assert (
        copies == "37 of 55 images, kept on one side of the split; 1 images are in several classes"
    )
    assert made.about["test: copies of training or validation images"] == "2 of 26 images (7.7%)"
    assert "2 of 26 images (7.7%) of the test data are copies" in caplog.text
    made.save(tmp_path / "out")
    assert (
        "copies of training or validation images" in (tmp_path / "out" / "report.html").read_text()
    )
    clean = adapt(model, read_labelled(str(places["train"])), tmp_path, 60, ["probe"], test=test)
    assert not any("copies" in name for name in clean.about)


def test_the_old_name_of_progress_still_works(model, places, tmp_path):
    data, messages = read_labelled(str(places["train"])), []
    with pytest.warns(DeprecationWarning, match="renamed to adapt"):
        adapt(model, data, tmp_path, 60, ["probe"], say=messages.append)
    assert "training images" in messages[0]
    assert messages[1].startswith("probe: ")


def test_classes_are_matched_by_name(places):
    data = read_labelled(str(places["train"]))
    turned = with_names(data, data.names[::-1])
    assert [turned.names[i] for i in turned.target] == [data.names[i] for i in data.target]
    with pytest.raises(ConfigError, match="'a red square' is none of the 2 classes"):
        with_names(data, data.names[:2])


def test_what_is_written_is_what_training_reads(places, tmp_path):
    data = read_labelled(str(places["train"]))
    pixels = [np.asarray(Image.open(path)) for path in data.images]
    kinds = [data.images[0], Path(data.images[1]).read_bytes(), pixels[2]]
    mixed = type(data)(kinds, data.target[:3], data.names, data.data)
    table = write_table(mixed, tmp_path / "data")
    source = open_source(DataConfig(source=str(table), label="label", captions=()), "train")
    assert len(source) == 3
    for i in range(3):
        assert source[i]["label"] == data.names[data.target[i]]
        np.testing.assert_array_equal(np.asarray(Image.open(source[i]["image"])), pixels[i])


def test_memory_and_time_are_those_of_the_block():
    with ResourceMeter() as first:
        time.sleep(0.05)
    with ResourceMeter() as second:
        held = np.ones(60_000_000)
        time.sleep(0.1)
        del held
    assert 0.05 <= first.seconds < second.seconds + 1
    assert second.peak - first.peak > 300e6


def test_the_command_leaves_a_folder_that_the_others_take(places, tmp_path, capsys):
    out = tmp_path / "adapted"
    line = ["adapt", str(places["train"]), "--model", str(tiny.run()),
            "--out", str(out), "--budget", "10m",
            "--method", "probe", "tip", "--test", str(places["test"]),
            "--out-of-distribution", str(places["far"]), "--templates", "plain"]  # fmt: skip
    assert main(line) == 0
    message = capsys.readouterr().out
    assert "zero-shot" in message
    results = json.loads((out / "results.json").read_text())
    rows = {row["method"]: row for row in results["methods"]}
    assert list(rows) == ["zero-shot", "probe", "tip"]
    best = max(rows.values(), key=lambda row: row["validation"]["value"])
    assert rows[results["chosen"]]["validation"] == best["validation"]
    assert rows["probe"]["trained"] == 3 * 16
    for row in rows.values():
        assert row["validation"]["n"] == 3
        assert row["test"]["n"] == 24
        assert row["shifted"]["n"] == 12
        assert row["peak"] > 1e7

    # The row of the chosen method is what its saved classifier scores.
    classifier = load_classifier(out / FILE, load(out))
    test = read_labelled(str(places["test"]))
    named = classifier(test.images).top(1)
    right = [row[0][0] == test.names[i] for row, i in zip(named, test.target, strict=True)]
    assert np.mean(right) == pytest.approx(rows[results["chosen"]]["test"]["value"])
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 4  # accuracy by method on three sets, and the confusion matrix
    assert f"vlm classify photo.jpg --model {out}" in page
    assert "Accuracy by class" in page
    assert page.count("<td>a blue square</td>") >= 1
    assert len(page) < 1_500_000
    assert not re.search(r"https?://(?!www.w3.org)", page)

    assert main(["classify", "--model", str(out), str(places["test"]), "--top", "1", "--json"]) == 0
    message = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(message) == 24
    by_file = {row["image"]: row["labels"][0]["label"] for row in message}
    for path, row in zip(test.images, named, strict=True):
        assert by_file[str(path)] == row[0][0]


@pytest.mark.slow
def test_a_method_that_does_not_fit_is_left_out_and_logged(model, places, tmp_path, monkeypatch):
    data, messages = read_labelled(str(places["train"])), []
    monkeypatch.setattr(fine_tuning, "FEWEST_STEPS", 10**8)
    monkeypatch.setattr(fine_tuning, "LEAST_STEPS", 10**8)
    # Without this, the forward pass alone is refused, before anything is compiled.
    monkeypatch.setattr(budgeted, "time_per_image", lambda *_: Estimate(0.0, 0.0))
    made = adapt(model, data, tmp_path, 60.0, ("probe", "full"), ["{}"], progress=messages.append)
    assert made["full"].validation is None
    note = r"100,000,000 steps of 8 images at .+ s take .+ s, and [\d.]+ s were left"
    assert re.match(note, made["full"].note)
    assert made.chosen in ("zero-shot", "probe")
    assert any(re.match(r"full: left out, 100,000,000 steps", message) for message in messages)
    assert not list((tmp_path / "full").glob("*"))  # no trace of a run that was refused


@pytest.mark.slow
def test_the_time_that_is_left_counts_after_the_warm_up(model, places, tmp_path):
    """A budget shorter than any fixed allowance for compilation; the run takes what is left."""
    data, messages = read_labelled(str(places["train"])), []
    made = adapt(model, data, tmp_path, 40.0, ("lora",), ["{}"], progress=messages.append)
    assert made["lora"].note == "40 steps of 8"
    (plan,) = [message for message in messages if message.startswith("lora: 40 steps")]
    assert re.search(r"40 steps of 8 images at .+ s take .+ s after .+ s of warm-up", plan)


def a_budget(left: float, share: float, **options) -> TimeBudget:
    return TimeBudget(1000.0 + left, 1000.0 + share, clock=lambda: 1000.0, **options)


def test_a_plan_is_of_the_slowest_step_and_the_share():
    plans = []
    budget = a_budget(48.0, 12.0, report=plans.append)
    estimate = Estimate.of([0.5, 0.4, 0.45], warm_up=30.0, once=2.0)
    assert budget.plan(estimate, wanted=40, least=8, steps="steps") == 20
    assert plans == ["20 steps at 0.4 to 0.5 s take 10 to 12 s after 30 s of warm-up"]
    assert budget.plan(estimate, wanted=5, least=8) == 5
    # The least number of steps may take more than the share, but not more than the budget.
    assert a_budget(48.0, 1.0).plan(estimate, wanted=40, least=8) == 8
    assert a_budget(6.01, 1.0).plan(estimate, wanted=40, least=8) == 8
    with pytest.raises(OverBudget) as refused:
        a_budget(5.5, 1.0).plan(estimate, wanted=40, least=8, steps="steps")
    assert str(refused.value) == (
        "8 steps at 0.4 to 0.5 s take 5.2 to 6 s, and 5.5 s were left after 30 s of warm-up"
    )
    assert refused.value.missing == pytest.approx(0.5)
    assert TimeBudget().plan(estimate, wanted=40, least=8) == 40  # no limit
    with pytest.raises(OverBudget, match="and 0 s were left"):
        a_budget(-3.0, -3.0).plan(Estimate(0.1, 0.1))


def test_the_warm_up_is_no_part_of_a_measurement():
    runs = []

    def work():
        time.sleep(0.2 if not runs else 0.01)
        runs.append(1)

    estimate = measured(work)
    assert 0.01 <= estimate.low <= estimate.high < 0.15
    assert 0.1 < estimate.warm_up < 0.3
    assert len(runs) == 4
    assert (estimate * 10).low == pytest.approx(10 * estimate.low)


def test_what_one_method_refuses_does_not_stop_the_others(model, places, tmp_path):
    data = read_labelled(str(places["train"]))
    long = [" ".join(["a"] * 12) + " {}"]  # there is no room for the class
    made = adapt(model, data, tmp_path, 600.0, ("probe", "prompt"), long)
    assert "tokens long and the model takes 12" in made["prompt"].note
    assert made["probe"].validation is not None
    with pytest.raises(ConfigError, match="tokens long and the model takes 12"):
        adapt(model, data, tmp_path, 600.0, ("prompt",), long)


def test_a_budget_too_small_is_one_sentence(model, places, tmp_path, monkeypatch):
    data = read_labelled(str(places["train"]))
    with pytest.raises(ConfigError, match=r"budget of 0.0001 s is too small for any method"):
        adapt(model, data, tmp_path, 1e-4)
    monkeypatch.setattr(fine_tuning, "FEWEST_STEPS", 10**8)
    monkeypatch.setattr(fine_tuning, "LEAST_STEPS", 10**8)
    with pytest.raises(ConfigError, match=r"budget of 20 s is too small .* give at least [\d,]+ s"):
        adapt(model, data, tmp_path, 20.0, ("full",), ["{}"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "soon"], "--budget 'soon' is not a duration"),
        (["--budget", "0m"], "--budget '0m' is not a duration"),
        (["--method", "magic"], "there is no method 'magic': choose from probe, tip"),
        (["--test", "nowhere"], "nowhere cannot be read"),
        (["--shots", "0"], "shots is 0"),
        (["--out", "/tmp"], "exists already"),
    ],
)
def test_bad_options(places, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["adapt", "--model", str(tiny.run()), str(places["train"]), *options]) != 0
    complaint = capsys.readouterr().err.strip().splitlines()
    assert len(complaint) == 1
    assert message in complaint[0]


@pytest.mark.slow
def test_fine_tuning_with_a_teacher_and_blends(model, places, tmp_path):
    """The teacher has wider embeddings than the model."""
    data, test = (read_labelled(str(places[name])) for name in ("train", "test"))
    methods = ("prompt", "full", "distill", "blend")
    made = adapt(
        model, data, tmp_path, 600.0, methods, ["{}"], test, read_labelled(str(places["far"])),
        teacher=load(TEACHER),
    )  # fmt: skip
    for name in methods:
        assert made[name].test.value >= made["zero-shot"].test.value - 0.15
    assert made["distill"].trained > 10 * made["prompt"].trained
    assert made["blend"].note.endswith(("of full", "of distill"))
    assert made.about["teacher"] == TEACHER.name
    config = json.loads((tmp_path / "distill" / "config.json").read_text())
    assert config["distill"]["teacher"] == str(TEACHER)


def test_distillation_has_a_teacher_and_a_teacher_a_pupil(model, places, tmp_path):
    data = read_labelled(str(places["train"]))
    with pytest.raises(ConfigError, match=r"needs a teacher model: give one .*--teacher"):
        adapt(model, data, tmp_path, 600.0, ("probe", "distill"))
    with pytest.raises(
        ConfigError, match="a teacher is given, but no method of probe, tip uses one"
    ):
        adapt(model, data, tmp_path, 600.0, ("probe", "tip"), teacher=model)
