"""Phases of an experiment: their JSON, their values, and each mistake in one sentence."""

import json
import re

import pytest

from vlm.config import (
    AugmentConfig,
    ConvNeXtConfig,
    DataConfig,
    Experiment,
    MixturePart,
    ModelConfig,
    Phase,
    PreprocessConfig,
    TextConfig,
    TokenizerConfig,
    ViTaminConfig,
    from_dict,
    in_phase,
    to_dict,
)
from vlm.errors import ConfigError

LARGE = {"model.vision.image_size": 256, "preprocess.image_size": 256}


def run(*phases, **fields) -> Experiment:
    parts = {
        "model": ModelConfig(),
        "preprocess": PreprocessConfig(),
        "tokenizer": TokenizerConfig(),
        "steps": 100,
    }
    return Experiment(phases=phases, **(parts | fields))


def test_changes_add_up_and_have_the_types_of_the_fields():
    part = {"source": "a.tar", "weight": 2}
    e = run(
        Phase({**LARGE, "batch-size": 512}, step=50),
        Phase({"data.mixture": [part], "data.augment.flip": True}, step=60),
    )
    assert dict(e.phases[1].changes)["data.mixture"] == (MixturePart("a.tar", weight=2.0),)
    first, second = in_phase(e, 1), in_phase(e, 2)
    assert (in_phase(e, 0).batch_size, first.batch_size, second.batch_size) == (1024, 512, 512)
    assert first.data == DataConfig()
    assert second.data.augment == AugmentConfig(flip=True)
    assert [len(x.phases) for x in (in_phase(e, 0), first, second)] == [2, 1, 0]
    again = from_dict(Experiment, json.loads(json.dumps(to_dict(e))))
    assert again == e
    assert hash(again) == hash(e)
    replaced = run(Phase({"data.mixture.0.weight": 3}, step=5), data=DataConfig(mixture=(part,)))
    assert in_phase(replaced, 1).data.mixture[0].weight == 3.0


def test_a_part_that_a_model_fills_in_is_checked_after_that():
    later = Phase({"model.vision.image_size": 10}, step=5)
    e = Experiment(steps=10, init_from="somewhere", phases=(later,))
    assert e.phases == (later,)
    with pytest.raises(ConfigError, match=r"phase 1 \(step 5\): image_size 10 holds no patch"):
        run(later)


def test_what_a_resumed_run_may_not_change_but_a_phase():
    run(Phase(LARGE, step=5), Phase({"freeze": ["vision/.*"]}, step=6))
    run(Phase({"lock": "text"}, step=5), init_from="somewhere")
    sizes = {"model.vision.image_size": 288, "preprocess.image_size": 288}
    convolutional = ModelConfig(ConvNeXtConfig(image_size=256), TextConfig())
    run(Phase(sizes, step=9), model=convolutional, preprocess=PreprocessConfig(image_size=256))


WRONG = {
    "a point twice": (lambda: Phase({}, step=5, fraction=0.5), "and not step and fraction"),
    "no point": (lambda: Phase({"batch_size": 5}), "give one of step, fraction and examples"),
    "no mapping": (lambda: Phase(3, step=5), "must be a mapping of names, not 3"),
    "no name": (lambda: Phase([(3, 4)], step=5), "give a name and a value"),
    "a name twice": (lambda: Phase([("a", 1), ("--a", 2)], step=5), "has 'a' twice: keep one"),
    "step 0": (lambda: Phase({}, step=0), "choose a number from 1 to"),
    "the end": (lambda: Phase({}, fraction=1.0), "choose a number above 0 and below 1"),
    "no change": (lambda: run(Phase({}, step=5)), "phase 1 (step 5) changes nothing"),
    "unknown": (
        lambda: run(Phase({"batch_sizes": 5}, step=5)),
        "phase 1 (step 5): Experiment has no field 'batch_sizes': did you mean batch_size",
    ),
    "unknown inside": (
        lambda: run(Phase({"data.weigths": 5}, step=5)),
        "DataConfig has no field 'weigths': it has source,",
    ),
    "a part that is not set": (
        lambda: run(Phase({"distill.task": 1.0}, step=5)),
        "distill.task does not exist, since distill is not set: give distill",
    ),
    "a part that is not there": (
        lambda: run(Phase({"data.mixture.0.weight": 1.0}, step=5)),
        "mixture.0.weight does not exist, since mixture is (): give mixture",
    ),
    "a wrong value": (
        lambda: run(Phase({"batch_size": 0}, step=5)),
        "phase 1 (step 5): Experiment.batch_size is 0: choose a number from 1",
    ),
    "a wrong type": (
        lambda: run(Phase({"data.augment.flip": "yes"}, step=5)),
        "AugmentConfig.flip must be bool, not 'yes'",
    ),
    "half of a size": (
        lambda: run(Phase({"model.vision.image_size": 256}, step=5)),
        "preprocess.image_size 224 is not the model's 256: set both",
    ),
    "beyond the end": (
        lambda: run(Phase(LARGE, step=100)),
        "phase 1 begins at step 100, and the run ends at step 100: make the run longer",
    ),
    "beyond the last example": (
        lambda: run(Phase(LARGE, examples=2000), steps=None, examples=1500),
        "phase 1 begins at example 2,000, and the run ends at examples 1,500",
    ),
    "out of order": (
        lambda: run(Phase(LARGE, step=9), Phase({"batch_size": 5}, step=9)),
        "phase 2 begins at step 9, and phase 1 at step 9: put the phases in their order",
    ),
    "two units": (
        lambda: run(Phase(LARGE, step=9), Phase({"batch_size": 5}, fraction=0.5)),
        "the phases begin by fraction and step: give all of them in one unit",
    ),
    "seconds": (
        lambda: run(Phase(LARGE, step=9), steps=None, seconds=60.0),
        "a run of 60 seconds cannot have phases",
    ),
    "the whole run's": (
        lambda: run(Phase({"checkpoint_every": 0.5}, step=9)),
        "phase 1 (step 9) cannot change --checkpoint-every, which belongs to the whole run",
    ),
    "a phase in a phase": (
        lambda: run(Phase({"phases": []}, step=9)),
        "cannot change --phases, which belongs to the whole run",
    ),
    "the architecture": (
        lambda: run(Phase({"model.text.depth": 3}, step=9)),
        "cannot change --model.text.depth (12 to 3), which the saved parameters or optimizer state",
    ),
    "the update rule": (
        lambda: run(Phase({"optimizer.name": "lion"}, step=9)),
        "cannot change --optimizer.name ('adamw' to 'lion')",
    ),
    "an average": (
        lambda: run(Phase({"optimizer.ema": 0.9}, step=9)),
        "cannot change --optimizer.ema (None to 0.9)",
    ),
    "the tokenizer": (
        lambda: run(Phase({"tokenizer.lowercase": True}, step=9)),
        "cannot change --tokenizer.lowercase (False to True), which is saved with the tokenizer",
    ),
    "the held-out part": (
        lambda: run(Phase({"data.hold_out": 0.1}, step=9)),
        "cannot change --data.hold-out (0.0 to 0.1), since the run would be evaluated on examples",
    ),
    "sizes of another tower": (
        lambda: run(
            Phase({"model.vision.image_size": 320, "preprocess.image_size": 320}, step=9),
            model=ModelConfig(ViTaminConfig(image_size=256), TextConfig()),
            preprocess=PreprocessConfig(image_size=256),
        ),
        "cannot change --model.vision.image-size of a ViTaminConfig, only of a Vision Transformer",
    ),
    "a restart of no schedule": (
        lambda: run(Phase({}, step=5, restart_schedule=True), optimizer={"transformation": "a:b"}),
        "optimizer.transformation has a schedule of its own: leave restart_schedule out",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.untyped
def test_a_wrong_phase_is_refused_by_name(name):
    make, message = WRONG[name]
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        make()
    assert "\n" not in str(caught.value)
