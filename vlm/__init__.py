"""vlm: contrastive vision-language models in JAX.

The names of this module are the stable interface. Names that a subpackage's `__init__` exports
(`vlm.losses.sigmoid_loss`, `vlm.heads.Encoder`) are public too; they may change in a minor version,
with a DeprecationWarning. All other modules and names are private.

All names load on first use, so `import vlm` is fast.
"""

import sys

from etils import epy

from vlm._deprecation import RenamedModules, renamed
from vlm._version import __version__ as __version__

with epy.lazy_api_imports(globals()):
    from vlm import adaptation as adaptation
    from vlm import bench as bench
    from vlm import callbacks as callbacks
    from vlm import cluster as cluster
    from vlm import config as config
    from vlm import data as data
    from vlm import evaluation as evaluation
    from vlm import explanation as explanation
    from vlm import exporting as exporting
    from vlm import heads as heads
    from vlm import inputs as inputs
    from vlm import losses as losses
    from vlm import models as models
    from vlm import nn as nn
    from vlm import planning as planning
    from vlm import serving as serving
    from vlm import sharding as sharding
    from vlm import training as training
    from vlm import weights as weights
    from vlm.adaptation.blending import blend as blend
    from vlm.adaptation.budgeted import adapt as adapt
    from vlm.bundle import Bundle as Bundle
    from vlm.bundle import load as load
    from vlm.config import AugmentConfig as AugmentConfig
    from vlm.config import DataConfig as DataConfig
    from vlm.config import Experiment as Experiment
    from vlm.config import FastViTConfig as FastViTConfig
    from vlm.config import MeshConfig as MeshConfig
    from vlm.config import ModelConfig as ModelConfig
    from vlm.config import OptimizerConfig as OptimizerConfig
    from vlm.config import PreprocessConfig as PreprocessConfig
    from vlm.config import ResNetConfig as ResNetConfig
    from vlm.config import TextConfig as TextConfig
    from vlm.config import TextModuleConfig as TextModuleConfig
    from vlm.config import TokenizerConfig as TokenizerConfig
    from vlm.config import VisionModuleConfig as VisionModuleConfig
    from vlm.config import ViTConfig as ViTConfig
    from vlm.config import load_config as load_config
    from vlm.errors import CheckpointError as CheckpointError
    from vlm.errors import ConfigError as ConfigError
    from vlm.errors import ConflictError as ConflictError
    from vlm.errors import DataError as DataError
    from vlm.errors import ShardingError as ShardingError
    from vlm.errors import TrainingError as TrainingError
    from vlm.errors import VlmError as VlmError
    from vlm.evaluation.comparison import compare as compare
    from vlm.evaluation.runner import Report as Report
    from vlm.evaluation.runner import evaluate as evaluate
    from vlm.evaluation.tasks import DataInfo as DataInfo
    from vlm.evaluation.tasks import RetrievalTask as RetrievalTask
    from vlm.evaluation.tasks import SelectionTask as SelectionTask
    from vlm.evaluation.tasks import ZeroShotTask as ZeroShotTask
    from vlm.explanation.heat_map import explain as explain
    from vlm.exporting.bundle_export import export as export
    from vlm.heads.few_shot import FewShotClassifier as FewShotClassifier
    from vlm.heads.neighbours import NeighbourClassifier as NeighbourClassifier
    from vlm.heads.prompts import TEMPLATES as TEMPLATES
    from vlm.heads.query import Query as Query
    from vlm.heads.retrieval import RetrievalIndex as RetrievalIndex
    from vlm.heads.zero_shot import ZeroShotClassifier as ZeroShotClassifier
    from vlm.planning.prediction import plan as plan
    from vlm.serving.server import serve as serve
    from vlm.training.loop import steps as steps
    from vlm.training.loop import train as train

__getattr__ = renamed(
    __name__,
    {"VisionConfig": "vlm.config.towers.ViTConfig"},
    otherwise=globals()["__getattr__"],  # from lazy_api_imports
)
sys.meta_path.insert(0, RenamedModules())  # type: ignore[arg-type]

del epy, renamed, sys, RenamedModules
