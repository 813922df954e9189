"""vlm: contrastive vision-language models in JAX.

The names below are what most programs need. They load on first use, so `import vlm` is instant;
the rooms they come from (`vlm.losses`, `vlm.models`, ...) are there by their own names too.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vlm._version import __version__ as __version__

if TYPE_CHECKING:  # the same names for type checkers and editors; a test compares the two lists
    from vlm.bundle import Bundle as Bundle
    from vlm.bundle import load as load
    from vlm.config import AugmentConfig as AugmentConfig
    from vlm.config import DataConfig as DataConfig
    from vlm.config import Experiment as Experiment
    from vlm.config import MeshConfig as MeshConfig
    from vlm.config import ModelConfig as ModelConfig
    from vlm.config import OptimizerConfig as OptimizerConfig
    from vlm.config import PreprocessConfig as PreprocessConfig
    from vlm.config import TextConfig as TextConfig
    from vlm.config import TokenizerConfig as TokenizerConfig
    from vlm.config import VisionConfig as VisionConfig
    from vlm.config import load_config as load_config
    from vlm.errors import CheckpointError as CheckpointError
    from vlm.errors import ConfigError as ConfigError
    from vlm.errors import DataError as DataError
    from vlm.errors import ShardingError as ShardingError
    from vlm.errors import TrainingError as TrainingError
    from vlm.errors import VlmError as VlmError
    from vlm.evaluate.runner import Report as Report
    from vlm.evaluate.tasks import RetrievalTask as RetrievalTask
    from vlm.evaluate.tasks import ZeroShotTask as ZeroShotTask
    from vlm.heads.few_shot import FewShotClassifier as FewShotClassifier
    from vlm.heads.prompts import TEMPLATES as TEMPLATES
    from vlm.heads.retrieval import RetrievalIndex as RetrievalIndex
    from vlm.heads.zero_shot import ZeroShotClassifier as ZeroShotClassifier

_HOMES = {
    "vlm.bundle": ("Bundle", "load"),
    "vlm.config": (
        "AugmentConfig",
        "DataConfig",
        "Experiment",
        "MeshConfig",
        "ModelConfig",
        "OptimizerConfig",
        "PreprocessConfig",
        "TextConfig",
        "TokenizerConfig",
        "VisionConfig",
        "load_config",
    ),
    "vlm.errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "ShardingError",
        "TrainingError",
        "VlmError",
    ),
    "vlm.evaluate.runner": ("Report",),
    "vlm.evaluate.tasks": ("RetrievalTask", "ZeroShotTask"),
    "vlm.heads.few_shot": ("FewShotClassifier",),
    "vlm.heads.prompts": ("TEMPLATES",),
    "vlm.heads.retrieval": ("RetrievalIndex",),
    "vlm.heads.zero_shot": ("ZeroShotClassifier",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_ROOMS = ("config", "data", "evaluate", "heads", "losses", "models", "nn", "sharding", "train")

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value  # the next use does not come here
        return value
    if name in _ROOMS:
        return importlib.import_module(f"vlm.{name}")
    raise AttributeError(f"module 'vlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
