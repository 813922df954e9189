"""Writes `golden/oc_*`: small random models as open_clip's own folders, and what they compute.

Run with the extra `peers` installed: python tests/weights/make_open_clip.py
"""

import functools
import json
import logging
import pathlib
import re
import sys
from collections import OrderedDict

import numpy as np
import open_clip
import safetensors.torch
import timm
import torch
import transformers
from make_huggingface import TEXTS, images, randomise, small_vocabulary
from open_clip import model as oc_model
from open_clip.coca_model import CoCa
from open_clip.hf_configs import arch_dict
from open_clip.hf_model import HFTextEncoder
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.data import create_transform
from timm.data.naflex_dataset import NaFlexCollator
from timm.layers import AttentionPool2d, HybridEmbed, LayerNorm, LayerNorm2d, Mlp
from timm.models import vitamin
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.fastvit import FastVit, RepConditionalPosEnc
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.resnet import Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from tokenizers import processors
from torch import nn

GOLDEN = pathlib.Path(__file__).parent / "golden"
PLAIN = re.compile(r"vit_[a-z]+_patch\d+_\d+")

VISION = {"image_size": 28, "patch_size": 7, "width": 30, "head_width": 10, "layers": 2,
          "mlp_ratio": 1.3}  # fmt: skip
TEXT = {"context_length": 12, "width": 24, "heads": 3, "layers": 2, "mlp_ratio": 1.7,
        "hf_tokenizer_name": "here"}  # fmt: skip


def trunk(name: str, pool: str, proj: str | None = None, image_size: int = 28) -> dict:
    """A vision tower of timm's."""
    return {"image_size": image_size, "timm_model_name": name, "timm_model_pretrained": False,
            "timm_pool": pool, "timm_proj": proj}  # fmt: skip


CASES = {
    # As LAION and DataComp, with layer scale as in CLIPA's ViT-*-alt.
    "oc_vit": {
        "embed_dim": 20,
        "vision_cfg": VISION | {"ls_init_value": 0.1},
        "text_cfg": TEXT | {"ls_init_value": 0.1},
    },
    # As MetaCLIP's worldwide models: quick-GELU, pooled at the end token.
    "oc_quick": {
        "embed_dim": 20,
        "quick_gelu": True,
        "vision_cfg": VISION,
        "text_cfg": TEXT | {"pool_type": "eos", "eos_id": 1},
    },
    # As CLIPA: no norm before the blocks, the mean of the patches, bidirectional text.
    "oc_mean": {
        "embed_dim": 20,
        "custom_text": True,
        "vision_cfg": VISION
        | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True,
           "pos_embed_type": "sin_cos_2d", "norm_kwargs": {"eps": 1e-6},
           "act_kwargs": {"approximate": "tanh"}, "width": 28, "head_width": 7},
        "text_cfg": TEXT
        | {"no_causal_mask": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
           "act_kwargs": {"approximate": "tanh"}},
    },
    # The SigLIP exports: timm's tower.
    "oc_siglip": {
        "embed_dim": 36,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": trunk("vit_base_patch16_siglip_224", "map", "none"),
        "text_cfg": TEXT
        | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last",
           "norm_kwargs": {"eps": 1e-6}, "tokenizer_kwargs": {"clean": "canonicalize"}},
    },
    # SigLIP 2 NaFlex, as in open_clip's main branch.
    "oc_naflex": {
        "embed_dim": 24,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": trunk("naflexvit_base_patch16_siglip", "map", "none")
        | {"image_seq_len": 31},
        "text_cfg": TEXT
        | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last",
           "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
           "tokenizer_kwargs": {"clean": "canonicalize"}},
    },
    # PE-Core: timm's tower with rotary positions.
    "oc_pe": {
        "embed_dim": 20,
        "custom_text": True,
        "vision_cfg": trunk("vit_pe_core_tiny_patch16_384", "map"),
        "text_cfg": TEXT,
    },
    # MobileCLIP: timm's FastViT, with a batch norm before attention as in S0 to S2 ...
    "oc_fastvit": {
        "embed_dim": 20,
        "custom_text": True,
        "vision_cfg": trunk("fastvit_mci0", "avg"),
        "text_cfg": TEXT | {"no_causal_mask": True},
    },
    # ... and with a LayerNorm, and fewer branches in the stem, as in S3 and S4.
    "oc_fastvit_large": {
        "embed_dim": 20,
        "custom_text": True,
        "vision_cfg": trunk("fastvit_mci3", "avg"),
        "text_cfg": TEXT | {"no_causal_mask": True},
    },
    # MobileCLIP2-L-14: timm's ViT of CLIP.
    "oc_timm_clip": {
        "embed_dim": 20,
        "custom_text": True,
        "vision_cfg": trunk("vit_base_patch16_clip_224", "token"),
        "text_cfg": TEXT,
    },
    # ConvNeXt as LAION trained it, with a linear layer or an MLP after timm's own pool.
    "oc_convnext": {
        "embed_dim": 20,
        "vision_cfg": trunk("convnext_base", "", "linear", 44),
        "text_cfg": TEXT,
    },
    "oc_convnext_mlp": {
        "embed_dim": 20,
        "vision_cfg": trunk("convnext_xxlarge", "", "mlp", 32),
        "text_cfg": TEXT,
    },
    # EVA-CLIP: a plain ViT without a bias on its keys, EVA-02's gated blocks with rotary
    # positions, and the enormous one with norms after its branches.
    "oc_eva01": {
        "embed_dim": 20,
        "custom_text": True,
        "vision_cfg": trunk("eva_giant_patch14_224", "token"),
        "text_cfg": TEXT,
    },
    "oc_eva02": {
        "embed_dim": 20,
        "custom_text": True,
        "vision_cfg": trunk("eva02_base_patch16_clip_224", "token"),
        "text_cfg": TEXT,
    },
    "oc_eva02_enormous": {
        "embed_dim": 20,
        "custom_text": True,
        "vision_cfg": trunk("eva02_enormous_patch14_clip_224", "token"),
        "text_cfg": TEXT,
    },
    "oc_vitamin": {
        "embed_dim": 20,
        "custom_text": True,
        "vision_cfg": trunk("vitamin_small_224", "", "linear", 48),
        "text_cfg": TEXT,
    },
    "oc_mobileclip_b": {
        "embed_dim": 20,
        "custom_text": True,
        "vision_cfg": trunk("vit_base_mci_224", "token", None, 32),
        "text_cfg": TEXT,
    },
    # Text towers of transformers: XLM-RoBERTa's with the mean and an MLP, and NLLB's encoder.
    "oc_xlm_roberta": {
        "embed_dim": 20,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": {"hf_model_name": "xlm-roberta-base", "hf_tokenizer_name": "here",
                     "hf_pooler_type": "mean_pooler", "context_length": 12},
    },
    # BiomedCLIP: a plain ViT with a linear layer, BERT with its end, and an MLP.
    "oc_biomed": {
        "embed_dim": 20,
        "vision_cfg": trunk("vit_base_patch16_224", "", "linear"),
        "text_cfg": {"hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
                     "hf_tokenizer_name": "here", "hf_proj_type": "mlp",
                     "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 12},
    },
    # The other ends: timm's MLP after the mean, BERT's pooler, and no projection.
    "oc_bert": {
        "embed_dim": 24,
        "vision_cfg": trunk("vit_small_patch16_224", "avg", "mlp"),
        "text_cfg": {"hf_model_name": "bert-base-uncased", "hf_tokenizer_name": "here",
                     "hf_proj_type": None, "hf_pooler_type": "cls_pooler", "context_length": 12},
    },
    # Windows that are shifted and padded, and a ResNet with attention over its positions.
    "oc_swin": {
        "embed_dim": 20,
        "vision_cfg": trunk("swin_tiny_patch4_window7_224", "", "linear", 40),
        "text_cfg": TEXT,
    },
    "oc_resnet_v1": {
        "embed_dim": 20,
        "vision_cfg": trunk("resnet50", "abs_attn", None, 64),
        "text_cfg": TEXT,
    },
    # ModernBERT with local attention, and mT5's encoder.
    "oc_modernbert": {
        "embed_dim": 20,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": {"hf_model_name": "here/modernbert", "hf_tokenizer_name": "here",
                     "hf_pooler_type": "cls_pooler", "hf_proj_type": "linear",
                     "context_length": 12},
    },
    "oc_mt5": {
        "embed_dim": 20,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": {"hf_model_name": "google/mt5-base", "hf_tokenizer_name": "here",
                     "hf_pooler_type": "mean_pooler", "context_length": 12},
    },
    "oc_nllb": {
        "embed_dim": 20,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": {"hf_model_name": "facebook/nllb-200-distilled-600M",
                     "hf_tokenizer_name": "here", "hf_proj_type": "linear",
                     "hf_pooler_type": "cls_pooler", "context_length": 12},
    },
    "oc_coca": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": VISION
        | {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5,
           "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 1,
                           "mlp_ratio": 1, "attn_pooler_heads": 2},
    },
}  # fmt: skip
SEEDS = {"oc_vit": 10, "oc_quick": 11, "oc_mean": 12, "oc_siglip": 13, "oc_pe": 14,
         "oc_coca": 15, "oc_fastvit": 16, "oc_fastvit_large": 17,
         "oc_timm_clip": 18, "oc_convnext": 19, "oc_convnext_mlp": 20, "oc_eva01": 21,
         "oc_eva02": 22, "oc_eva02_enormous": 23, "oc_vitamin": 24, "oc_mobileclip_b": 25,
         "oc_xlm_roberta": 26, "oc_nllb": 27, "oc_biomed": 28, "oc_bert": 29,
         "oc_naflex": 30, "oc_swin": 31, "oc_resnet_v1": 32, "oc_modernbert": 33,
         "oc_mt5": 34}  # fmt: skip
PREPROCESS = {
    "oc_siglip": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                  "resize_mode": "squash"},
    "oc_naflex": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                  "resize_mode": "squash"},
    "oc_mean": {"interpolation": "bilinear"},
    "oc_fastvit": {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear",
                   "resize_mode": "shortest"},
}  # fmt: skip


def build(config: dict) -> torch.nn.Module:
    config = json.loads(json.dumps(config))
    custom = config.pop("custom_text", False)
    if "multimodal_cfg" in config:
        return CoCa(**config)
    # The towers of these names are far too large for a golden file: the same classes, small.
    encoder, native = config["text_cfg"].get("hf_model_name"), dict(config)
    if encoder:
        native["text_cfg"] = dict(TEXT)
    if config["vision_cfg"].get("timm_model_name"):
        native["vision_cfg"] = dict(VISION, width=32, head_width=8)
    model = (oc_model.CustomTextCLIP if custom or encoder else oc_model.CLIP)(**native)
    if encoder:
        model.text = text_encoder(encoder, config)
    if config["vision_cfg"].get("timm_model_name"):
        model.visual = torch.nn.Module()
        model.visual.trunk = small_trunk(config["vision_cfg"]["timm_model_name"])
        model.visual.head = torch.nn.Sequential(head(config))
        model.visual.forward = lambda x: model.visual.head(model.visual.trunk(x))
    return model


def head(config: dict) -> OrderedDict:
    """What open_clip's TimmModel puts behind a tower without a classifier."""
    projection = config["vision_cfg"]["timm_proj"]
    name, embed_dim = config["vision_cfg"]["timm_model_name"], config["embed_dim"]
    width = 30 if "vitamin" in name else 24 if name.startswith("vit_") else 32
    width = 16 if "swin" in name else width
    if "resnet" in name:
        return OrderedDict(pool=AttentionPool2d(128, feat_size=2, out_features=embed_dim))
    if projection == "linear":
        return OrderedDict(drop=nn.Dropout(0.0), proj=nn.Linear(width, embed_dim, bias=False))
    if projection == "mlp":
        return OrderedDict(mlp=Mlp(width, 2 * embed_dim, embed_dim, bias=(True, False)))
    return OrderedDict()


def small_trunk(name: str) -> torch.nn.Module:
    """The class of timm's tower `name`, small."""
    eps = functools.partial(LayerNorm, eps=1e-5)
    if "naflex" in name:
        cfg = NaFlexVitCfg(
            patch_size=6, embed_dim=24, depth=2, num_heads=12, mlp_ratio=1.8,
            act_layer="gelu_tanh", global_pool="map", pos_embed_interp_mode="bilinear",
            pos_embed_grid_size=(5, 5),
        )  # fmt: skip
        return NaFlexVit(cfg, num_classes=0)
    if "pe_core" in name:
        return Eva(
            img_size=28, patch_size=7, embed_dim=24, depth=2, num_heads=3, mlp_ratio=1.5,
            global_pool="map", attn_type="rope", use_pre_transformer_norm=True,
            use_rot_pos_emb=True, ref_feat_shape=(4, 4), rope_grid_offset=1.0,
            rope_grid_indexing="xy", attn_pool_num_heads=8, attn_pool_mlp_ratio=1.25,
            norm_layer=eps, num_classes=20,
        )  # fmt: skip
    if "eva" in name:
        gated = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True,
                 "scale_attn_inner": True, "use_rot_pos_emb": True,
                 "ref_feat_shape": (16, 16)}  # fmt: skip
        gated = gated if "eva02_base" in name else {"use_post_norm": "enormous" in name}
        width, count = (48, 12) if "eva02_base" in name else (32, 16)
        return Eva(
            img_size=28, patch_size=7, embed_dim=width, depth=2, num_heads=count, mlp_ratio=1.6,
            global_pool="token", num_classes=20, **gated,
        )  # fmt: skip
    if "convnext" in name:
        more = {"norm_eps": 1e-5} if "xxlarge" in name else {}
        return ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), num_classes=0,
                        ls_init_value=0.1, **more)  # fmt: skip
    if "swin" in name:
        return SwinTransformer(
            img_size=40, window_size=3, embed_dim=8, depths=(2, 4), num_heads=(2, 4), mlp_ratio=1.5,
            num_classes=0,
        )  # fmt: skip
    if "resnet" in name:
        model = ResNet(Bottleneck, (1, 2, 1, 1), channels=(4, 8, 16, 32), num_classes=0,
                       global_pool="")  # fmt: skip
        # timm's stem has 64 channels.
        model.conv1, model.bn1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4)
        model.layer1[0].conv1 = nn.Conv2d(4, 4, 1, bias=False)
        model.layer1[0].downsample[0] = nn.Conv2d(4, 16, 1, bias=False)
        return model
    if "vitamin" in name:
        cfg = vitamin.VitCfg(embed_dim=(8, 16, 30), depths=(2, 1, 1), stem_width=8)
        embed = functools.partial(HybridEmbed, backbone=vitamin.MbConvStages(cfg=cfg), proj=False)
        return VisionTransformer(
            img_size=48, patch_size=1, embed_dim=30, depth=2, num_heads=6, mlp_ratio=1.4,
            class_token=False, global_pool="avg", embed_layer=embed, num_classes=0,
            mlp_layer=vitamin.GeGluMlp,
        )  # fmt: skip
    if "mci" in name:
        stem = ConvStem(channels=(8, 12, 24), stride=(2, 2, 2), kernel_size=(2, 2, 2), padding=0,
                        act_layer=nn.GELU)  # fmt: skip
        return VisionTransformer(
            img_size=32, patch_size=1, embed_dim=24, depth=2, num_heads=12, mlp_ratio=1.6,
            no_embed_class=True, num_classes=20,
            embed_layer=functools.partial(HybridEmbed, backbone=stem, proj=False),
        )  # fmt: skip
    if "fastvit" in name:
        return fastvit(large=name.endswith("3"))
    if "clip" in name:
        return VisionTransformer(
            img_size=28, patch_size=7, embed_dim=24, depth=2, num_heads=12, mlp_ratio=1.6,
            pre_norm=True, norm_layer=eps, num_classes=20,
        )  # fmt: skip
    if "siglip" not in name:
        mean = "small" in name  # as reset_classifier does: the norm stays before the pool
        return VisionTransformer(
            img_size=28, patch_size=7, embed_dim=24, depth=2, num_heads=6 if mean else 12,
            mlp_ratio=1.6, num_classes=0, global_pool="avg" if mean else "token", fc_norm=False,
        )  # fmt: skip
    return VisionTransformer(
        img_size=28, patch_size=7, embed_dim=36, depth=2, num_heads=12, mlp_ratio=1.6,
        class_token=False, global_pool="map", num_classes=0,
    )  # fmt: skip


def text_encoder(name: str, config: dict) -> HFTextEncoder:
    """The class of transformers' encoder `name`, small, in open_clip's frame."""
    text = config["text_cfg"]
    if "roberta" in name:
        small = transformers.XLMRobertaConfig(
            vocab_size=text["vocab_size"], hidden_size=24, num_hidden_layers=2,
            num_attention_heads=12, intermediate_size=34, max_position_embeddings=20,
            type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1,
        )  # fmt: skip
    elif "modernbert" in name:
        small = transformers.ModernBertConfig(
            vocab_size=text["vocab_size"], hidden_size=24, num_hidden_layers=4,
            num_attention_heads=3, intermediate_size=34, local_attention=6, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        )  # fmt: skip
        # As in open_clip's main branch.
        names = {"width": "hidden_size", "layers": "num_hidden_layers"}
        arch_dict["modernbert"] = {"config_names": names, "pooler": "mean_pooler"}
    elif "mt5" in name:
        small = transformers.MT5Config(
            vocab_size=text["vocab_size"], d_model=24, num_layers=2, num_decoder_layers=1,
            num_heads=3, d_kv=6, d_ff=34, pad_token_id=1, relative_attention_max_distance=12,
            relative_attention_num_buckets=8,
        )  # fmt: skip
    elif "bert" in name.lower():
        small = transformers.BertConfig(
            vocab_size=text["vocab_size"], hidden_size=24, num_hidden_layers=2,
            num_attention_heads=12, intermediate_size=34, max_position_embeddings=20,
        )  # fmt: skip
    else:
        small = transformers.M2M100Config(
            vocab_size=text["vocab_size"], d_model=32, encoder_layers=2, decoder_layers=1,
            encoder_attention_heads=16, decoder_attention_heads=2, encoder_ffn_dim=44,
            decoder_ffn_dim=8, max_position_embeddings=1024, scale_embedding=True, pad_token_id=1,
        )  # fmt: skip
    encoder = HFTextEncoder(
        name, config["embed_dim"], small, text["hf_pooler_type"], text.get("hf_proj_type", "mlp")
    )
    if "nllb" in name or "mt5" in name:
        encoder.transformer = encoder.transformer.encoder
    elif text["hf_pooler_type"] != "cls_pooler":
        encoder.transformer.pooler = None
    return encoder


def fastvit(*, large: bool) -> FastVit:
    """Small and odd: a stage of attention with positions, and one that keeps the width."""
    position = functools.partial(RepConditionalPosEnc, spatial_shape=(7, 7))
    more = {"norm_layer": functools.partial(LayerNorm2d, eps=1e-5), "stem_use_scale_branch": False}
    return FastVit(
        layers=(1, 2, 1), embed_dims=(8, 16, 32), mlp_ratios=(1.5, 1.3, 1.7),
        downsamples=(False, True, True), se_downsamples=(False, not large, False),
        pos_embs=(None, None, position), token_mixers=("repmixer", "repmixer", "attention"),
        layer_scale_init_value=0.1, lkc_use_act=True, num_classes=20, **(more if large else {}),
    )  # fmt: skip


def random_statistics(model: torch.nn.Module, seed: int) -> None:
    """Batch norms as if they had seen images."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.2, generator=generator)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith((".bn.weight", "identity.weight")):
            tensor.uniform_(0.7, 1.7, generator=generator)


def other_lengths(model: torch.nn.Module, config: dict, folder: pathlib.Path) -> None:
    """Texts through the same model with fewer and with more positions, as open_clip makes them."""
    out = {}
    for length in (7, 19):
        other = json.loads(json.dumps(config))
        other["text_cfg"]["context_length"] = length
        other = build(other).eval()
        state = model.state_dict()
        oc_model.resize_text_pos_embed(state, other)
        other.load_state_dict(state)
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}", context_length=length)(TEXTS)
        with torch.no_grad():
            z = torch.nn.functional.normalize(other.encode_text(tokens), dim=-1)
        out |= {f"tokens/{length}": tokens.numpy().astype(np.int32), f"z_text/{length}": z.numpy()}
    np.savez_compressed(folder / "context.npz", texts=np.array(TEXTS), **out)


def naflex(folder: pathlib.Path, model, raw: list, tokens: torch.Tensor, length: int) -> None:
    """Images of any aspect through the transform of open_clip's NaFlexEvalTransformFactory."""
    transform = create_transform(
        is_training=False, naflex=True, patchify=True, max_seq_len=length, patch_size=6,
        input_size=30, interpolation="bicubic", mean=[0.5] * 3, std=[0.5] * 3,
    )  # fmt: skip
    cut = [transform(Image.fromarray(image)) for image in raw]
    batch, _ = NaFlexCollator(max_seq_len=length)([(patches, 0) for patches in cut])
    with torch.no_grad():
        z_image = torch.nn.functional.normalize(model.visual(batch), dim=-1)
        z_text = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
        logits = model.logit_scale.exp() * z_image @ z_text.T + model.logit_bias
    np.savez_compressed(
        folder / "naflex.npz",
        **{f"image/{i}": image for i, image in enumerate(raw)},
        pixels=batch["patches"].numpy(),
        mask=batch["patch_valid"].numpy(),
        shapes=np.stack([patches["patch_coord"].numpy().max(0) + 1 for patches in cut]),
        texts=np.array(TEXTS),
        z_image=z_image.numpy(),
        z_text=z_text.numpy(),
        logits=logits.numpy(),
    )


def timm_towers() -> None:
    """What timm's towers are by their names, for the table in `vlm/weights/timm.py`."""
    towers = {}
    clip = [f"vit_{size}_patch*_clip_*" for size in ("base", "large")]
    plain = [name for name in timm.list_models("vit_*") if PLAIN.fullmatch(name)]
    for name in [*timm.list_models(["vit_*_siglip_*", "vit_pe_core_*", *clip]), *plain]:
        if "_gap_" in name or "_plus_" in name or "_quickgelu_" in name:
            continue  # without attention pooling, or not written
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0 if "siglip" in name else 1024)
        block, pool = model.blocks[0], model.attn_pool
        # At 1 the exact GELU is 0.84134 and the other 0.84119; the pool has the blocks'.
        mlps = [block.mlp] if pool is None else [block.mlp, pool.mlp]
        at_one = {round(mlp.act(torch.ones(())).item(), 4) for mlp in mlps}
        activation = {0.8413: "gelu", 0.8412: "gelu_tanh"}
        towers[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "image_size": model.patch_embed.img_size[0],
            "patch_size": model.patch_embed.patch_size[0],
            "width": model.embed_dim,
            "depth": len(model.blocks),
            "heads": block.attn.num_heads,
            "mlp_dim": block.mlp.fc1.out_features,
            "pool_heads": (pool or block.attn).num_heads,
            "pool_mlp_dim": mlps[-1].fc1.out_features,
            "activation": activation[at_one.pop()] if len(at_one) == 1 else None,
            "norm_eps": block.norm1.eps,
        }
    (GOLDEN / "timm_towers.json").write_text(json.dumps(towers, indent=1) + "\n")


def main(names: list[str]) -> None:
    for name in names or CASES:
        config = CASES[name]
        seed = SEEDS[name]
        torch.manual_seed(seed)
        folder = GOLDEN / name
        folder.mkdir(parents=True, exist_ok=True)
        encoder = config["text_cfg"].get("hf_model_name")
        # RoBERTa's padding is token 1, and a text begins and ends with tokens of its own.
        bert = bool(encoder) and "bert" in encoder.lower() and "roberta" not in encoder
        specials = ["<s>", "<pad>", "<eos>"] if encoder else ["<pad>", "<eos>"]
        specials = ["<pad>", "<s>", "<eos>"] if bert else specials
        vocabulary = small_vocabulary(specials)
        vocabulary.post_processor = processors.TemplateProcessing(
            single="<s> $A <eos>" if encoder else "$A <eos>",
            special_tokens=[(token, i) for i, token in enumerate(specials) if token != "<pad>"],
        )
        (folder / "tokenizer.json").write_text(vocabulary.to_str())
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>",
                 "eos_token": "<eos>"}  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
        config["text_cfg"]["vocab_size"] = vocabulary.get_vocab_size()
        model = build(config).eval()
        randomise(model, seed)
        random_statistics(model, seed)
        if name in ("oc_modernbert", "oc_mt5"):
            model.text.config.to_json_file(folder / "config.json")
        preprocess = PREPROCESS.get(name, {})
        description = {"model_cfg": config, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(description, indent=2))
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")

        raw = images(seed)
        size = config["vision_cfg"]["image_size"]
        transform = image_transform_v2(PreprocessCfg(size=size, **preprocess), is_train=False)
        pixels = torch.stack([transform(Image.fromarray(image)) for image in raw])
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        tokens = tokenizer(TEXTS)
        if name == "oc_naflex":
            naflex(folder, model, raw, tokens, config["vision_cfg"]["image_seq_len"])
            continue
        with torch.no_grad():
            timm = config["vision_cfg"].get("timm_model_name")
            z_image = model.visual(pixels) if timm else model.encode_image(pixels)
            z_image = torch.nn.functional.normalize(z_image, dim=-1)
            z_text = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
            logits = model.logit_scale.exp() * z_image @ z_text.T
            if model.logit_bias is not None:
                logits = logits + model.logit_bias
        if name in ("oc_vit", "oc_coca"):
            other_lengths(model, config, folder)
        if name == "oc_vit":
            larger = json.loads(json.dumps(config))
            larger["vision_cfg"]["image_size"] = 49
            larger = build(larger).eval()
            resized = model.state_dict()
            oc_model.resize_pos_embed(resized, larger)
            larger.load_state_dict(resized)
            big = torch.randn(2, 3, 49, 49)
            with torch.no_grad():
                z = larger.encode_image(big).numpy()
            np.savez_compressed(
                folder / "resized.npz", pixels=big.permute(0, 2, 3, 1).numpy(), z_image=z
            )
        np.savez_compressed(
            folder / "outputs.npz",
            **{f"image/{i}": image for i, image in enumerate(raw)},
            pixels=pixels.permute(0, 2, 3, 1).numpy(),
            tokens=tokens.numpy().astype(np.int32),
            z_image=z_image.numpy(),
            z_text=z_text.numpy(),
            logits=logits.numpy(),
            texts=np.array(TEXTS),
        )


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main(sys.argv[1:])
    if not sys.argv[1:]:
        timm_towers()
