"""Configs of experiments: frozen dataclasses, their JSON form, and loading of `configs/*.py`.

A config file is Python that binds the name `config` to an `Experiment`. It determines the run, and
is saved as JSON in the run folder.
"""

from vlm._deprecation import renamed
from vlm.config.absent_towers import NoTextConfig as NoTextConfig
from vlm.config.absent_towers import NoVisionConfig as NoVisionConfig
from vlm.config.absent_towers import absence as absence
from vlm.config.base import Config as Config
from vlm.config.base import kept_tokens as kept_tokens
from vlm.config.code import Code as Code
from vlm.config.code import DataSource as DataSource
from vlm.config.code import ImportPath as ImportPath
from vlm.config.code import SourceCode as SourceCode
from vlm.config.code import find_codes as find_codes
from vlm.config.data import AugmentConfig as AugmentConfig
from vlm.config.data import DataConfig as DataConfig
from vlm.config.data import FieldFilter as FieldFilter
from vlm.config.data import MixturePart as MixturePart
from vlm.config.divergence import DivergenceConfig as DivergenceConfig
from vlm.config.efficientnet import EfficientNetConfig as EfficientNetConfig
from vlm.config.efficientnet import EfficientNetStage as EfficientNetStage
from vlm.config.encoders import EncoderTextConfig as EncoderTextConfig
from vlm.config.evaluation import EvalConfig as EvalConfig
from vlm.config.fastvit import FastViTConfig as FastViTConfig
from vlm.config.fastvit import FastViTStage as FastViTStage
from vlm.config.files import check_types as check_types
from vlm.config.files import from_dict as from_dict
from vlm.config.files import load_config as load_config
from vlm.config.files import to_dict as to_dict
from vlm.config.fine_tuning import AdapterConfig as AdapterConfig
from vlm.config.fine_tuning import DistillConfig as DistillConfig
from vlm.config.groupvit import GroupViTConfig as GroupViTConfig
from vlm.config.inputs import CLIP_MEAN as CLIP_MEAN
from vlm.config.inputs import CLIP_STD as CLIP_STD
from vlm.config.inputs import Clean as Clean
from vlm.config.inputs import PreprocessConfig as PreprocessConfig
from vlm.config.inputs import TokenizerConfig as TokenizerConfig
from vlm.config.local_checkpoints import LocalCheckpointConfig as LocalCheckpointConfig
from vlm.config.model import LOSS_SCORES as LOSS_SCORES
from vlm.config.model import Loss as Loss
from vlm.config.model import ModelConfig as ModelConfig
from vlm.config.model import TextConfig as TextConfig
from vlm.config.model import TextPool as TextPool
from vlm.config.model import TextTowerConfig as TextTowerConfig
from vlm.config.module_towers import MeshAxis as MeshAxis
from vlm.config.module_towers import TextModuleConfig as TextModuleConfig
from vlm.config.module_towers import VisionModuleConfig as VisionModuleConfig
from vlm.config.optimizer import OptimizerConfig as OptimizerConfig
from vlm.config.phases import Phase as Phase
from vlm.config.phases import in_phase as in_phase
from vlm.config.placeholders import require_bucket as require_bucket
from vlm.config.placeholders import with_bucket as with_bucket
from vlm.config.placeholders import without_evals as without_evals
from vlm.config.qformer import QFormerConfig as QFormerConfig
from vlm.config.resnet_v1 import ResNetV1Config as ResNetV1Config
from vlm.config.selection import SelectionConfig as SelectionConfig
from vlm.config.swin import SwinConfig as SwinConfig
from vlm.config.towers import Activation as Activation
from vlm.config.towers import ConvNeXtConfig as ConvNeXtConfig
from vlm.config.towers import MlpKind as MlpKind
from vlm.config.towers import NormKind as NormKind
from vlm.config.towers import ResNetConfig as ResNetConfig
from vlm.config.towers import VisionTowerConfig as VisionTowerConfig
from vlm.config.towers import ViTaminConfig as ViTaminConfig
from vlm.config.towers import ViTConfig as ViTConfig
from vlm.config.training import Experiment as Experiment
from vlm.config.training import MeshConfig as MeshConfig
from vlm.config.training import RematPolicy as RematPolicy
from vlm.config.training import loss_name as loss_name
from vlm.config.video_towers import VideoPrismConfig as VideoPrismConfig
from vlm.config.video_towers import XCLIPConfig as XCLIPConfig

__getattr__ = renamed(__name__, {"VisionConfig": "vlm.config.towers.ViTConfig"})
del renamed
