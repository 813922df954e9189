"""Layers of the towers: patch embeddings, attention, scanned transformer, pooling."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.nn.attention import Attention as Attention
    from vlm.nn.intermediates import Intermediates as Intermediates
    from vlm.nn.intermediates import capture as capture
    from vlm.nn.layers import LayerNorm as LayerNorm
    from vlm.nn.layers import Mlp as Mlp
    from vlm.nn.layers import RMSNorm as RMSNorm
    from vlm.nn.naflex import Patches as Patches
    from vlm.nn.patches import ConvStem as ConvStem
    from vlm.nn.patches import PatchStem as PatchStem
    from vlm.nn.pooling import MapPool as MapPool
    from vlm.nn.pooling import ProbePool as ProbePool
    from vlm.nn.pooling import QueryPool as QueryPool
    from vlm.nn.transformer import Block as Block
    from vlm.nn.transformer import Execution as Execution
    from vlm.nn.transformer import Transformer as Transformer
    from vlm.nn.transformer import run_stacked as run_stacked
    from vlm.nn.transformer import stack_blocks as stack_blocks
