"""vlm's table of timm's preprocessing against `default_cfgs` of timm.

`python -m tests.peers.test_timm_preprocess` rewrites the table from the timm that is installed.
"""

import json

import pytest

from vlm.weights import timm, timm_folders

pytestmark = pytest.mark.peers


def read() -> tuple[list, dict[str, dict[str, int]]]:
    """Return the different settings, and the number of those of each tag of each name."""
    registry = pytest.importorskip("timm.models._registry")
    settings, names = [], {}
    for name in sorted(registry.list_models()):
        if not any(pattern.match(name) for pattern in timm.NAMES):
            continue
        for tag, cfg in registry._model_default_cfgs[name].cfgs.items():
            assert cfg.interpolation == "bicubic"
            found = [cfg.crop_pct, list(cfg.mean), list(cfg.std), cfg.crop_mode]
            if found not in settings:
                settings.append(found)
            names.setdefault(name, {})[tag] = settings.index(found)
    return settings, names


def test_the_preprocessing_of_every_name_is_timms():
    settings, names = read()
    assert len(names) > 90
    for name, tags in names.items():
        for tag, number in tags.items():
            crop, mean, std, mode = settings[number]
            expected = {"crop_pct": crop, "mean": mean, "std": std, "crop_mode": mode}
            assert timm_folders.named_preprocess(f"{name}.{tag}", name) == expected
    assert timm_folders.preprocess_table()["names"].keys() == names.keys()
    assert names.keys() >= timm.TOWERS.keys()


if __name__ == "__main__":
    settings, names = read()
    lines = [f'"{name}": {json.dumps(tags)}' for name, tags in names.items()]
    first = ",\n".join(json.dumps(values) for values in settings)
    timm_folders.PREPROCESS.write_text(
        f'{{"settings": [\n{first}\n],\n"names": {{\n' + ",\n".join(lines) + "\n}}\n"
    )
