"""Plans of batches of several shapes: each is that of its own experiment, and times are means."""

import dataclasses

import pytest
from rich.console import Console

import vlm
from vlm.config.batch_sizes import at_size, at_text_length, batch_sizes
from vlm.errors import ConfigError, ShardingError
from vlm.planning import plan
from vlm.planning.report import show

LENGTHS = (64, 256, 64)
E = vlm.Experiment(
    model=vlm.ModelConfig(
        vision=vlm.ViTConfig(
            max_patches=256, width=256, depth=2, heads=4, mlp_dim=512, projection="linear"
        ),
        text=vlm.TextConfig(
            causal=True, pool="argmax", context_length=77, width=256, depth=2, heads=4, mlp_dim=512
        ),
        embed_dim=64,
    ),
    preprocess=vlm.PreprocessConfig(resize="naflex", patch_size=16, max_patches=256),
    tokenizer=vlm.TokenizerConfig(context_length=77),
    data=vlm.DataConfig(source="pairs.tar"),
    batch_size=1024,
    examples=100_000_000,
    sequence_lengths=LENGTHS,
    text_lengths=(16, 32),
)


def of(e, **options):
    return plan(e, "h100:8", compiled=False, **options)


def test_each_shape_is_planned_and_a_step_is_their_mean():
    found = of(E)
    alone = dataclasses.replace(E, text_lengths=())
    parts = [of(at_size(alone, size)) for size in batch_sizes(alone)]
    assert [p.experiment.batch_size for p in found.sizes] == [4096, 1024, 4096]
    seconds = [p.step_seconds.middle for p in parts]
    assert found.step_seconds.middle == pytest.approx(sum(seconds) / 3)
    assert found.pairs_per_second.middle == pytest.approx((4096 * 2 + 1024) / sum(seconds))
    assert found.memory.peak == max(p.memory.peak for p in parts)
    assert found.needs().examples == pytest.approx(100_000_000, rel=1e-3)
    fixed = of(dataclasses.replace(alone, sequence_lengths=()))
    assert found.pairs_per_second.middle > 1.5 * fixed.pairs_per_second.middle
    texts = [
        of(at_text_length(dataclasses.replace(alone, sequence_lengths=()), n)) for n in (16, 32)
    ]
    assert [p.step_seconds for p in found.texts] == [p.step_seconds for p in texts]
    assert found.texts[0].step_seconds.middle < found.texts[1].step_seconds.middle
    values = found.to_dict()
    assert [row["patches"] for row in values["sequence_lengths"]] == list(LENGTHS)
    assert [row["text_tokens"] for row in values["text_lengths"]] == [16, 32]


def test_the_report_lists_each_program():
    console = Console(width=132)
    with console.capture() as captured:
        show(of(E), console)
    text = captured.get()
    assert text.count("1,024 pairs: images of 256 patches, texts of 77 tokens") >= 1
    assert text.count("4,096 pairs: images of 64 patches, texts of 77 tokens") == 2
    assert "1,024 pairs: images of 256 patches, texts of 16 tokens" in text


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ConfigError, match="leave --largest-batch out"):
        of(E, largest=True)
    with pytest.raises(ShardingError, match=r"batch_size 1000 is 1[0-9]+ pairs at the sequence"):
        of(dataclasses.replace(E, batch_size=1000, sequence_lengths=(200, 256)))
