"""The known public checkpoints, as a table to choose from.

Accuracy is zero-shot ImageNet top-1, parameters and FLOPs (multiply-adds) are for one image and one
text of full length. Where no source that we could read gives a number, there is none.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from vlm.errors import ConfigError

OPEN_CLIP = "open_clip docs/openclip_results.csv"


@dataclass(frozen=True)
class Entry:
    """One checkpoint: its name for `vlm.load`, and what one chooses by."""

    name: str
    family: str
    architecture: str
    image_size: int
    context_length: int
    parameters: float | None  # millions
    image_gflops: float | None
    text_gflops: float | None
    languages: str  # names, multilingual (languages that its text tower knows), or worldwide
    licence: str | None  # None: its files do not say
    imagenet: float | None = None  # percent
    source: str | None = None  # of the accuracy


# Architecture: image size, parameters in millions, GFLOPs of an image, GFLOPs of a text
# (open_clip docs/model_profile.csv). Parameters that it lacks are counted, of abstract models of
# ours or of open_clip's: tests/weights/test_catalogue.py and tests/peers/test_catalogue_counts.py.
_PROFILE: dict[str, tuple[int, float | None, float | None, float | None]] = {
    "RN50": (224, 102.01, 12.22, 5.96),
    "RN101": (224, 119.69, 19.54, 5.96),
    "RN50x4": (288, 178.3, 42.56, 9.27),
    "RN50x16": (384, 290.98, 149.39, 13.3),
    "RN50x64": (448, 623.26, 529.11, 23.55),
    "ViT-B/32": (224, 151.28, 8.82, 5.96),
    "ViT-B/32@256": (256, 151.29, 11.5, 5.96),
    "ViT-B/16": (224, 149.62, 35.13, 5.96),
    "ViT-L/14": (224, 427.62, 162.03, 13.3),
    "ViT-L/14@336": (336, 427.94, 381.92, 13.3),
    "ViT-H/14": (224, 986.11, 334.59, 47.09),
    "ViT-H/14@378": (378, 986.71, None, 47.09),
    "ViT-g/14": (224, 1366.68, 534.06, 47.09),
    "ViT-bigG/14": (224, 2539.57, 967.5, 97.86),
    "ViT-H/14 worldwide": (224, 1858.78, 334.59, None),
    "CoCa ViT-B/32": (224, 253.56, 9.19, 5.96),
    "CoCa ViT-L/14": (224, 638.45, 163.64, 13.3),
    "ConvNeXt-B": (224, 151.52, 30.71, 5.96),
    "ConvNeXt-B wide": (256, 179.39, 40.11, 9.27),
    "ConvNeXt-B wide@320": (320, 179.39, 62.67, 9.27),
    "ConvNeXt-L": (256, 351.77, 89.76, 17.73),
    "ConvNeXt-L@320": (320, 351.77, 140.25, 17.73),
    "ConvNeXt-XXL": (256, 1200.58, 395.94, 47.09),
    "EVA-01 g/14": (224, 1136.44, 534.06, 13.3),
    "EVA-01 g/14 plus": (224, 1366.62, 534.06, 47.09),
    "EVA-02 B/16": (224, 149.69, 35.13, 5.96),
    "EVA-02 L/14": (224, 427.76, 162.0, 13.3),
    "EVA-02 L/14@336": (336, 428.08, 381.86, 13.3),
    "EVA-02 E/14": (224, 4704.59, 2264.33, 47.09),
    "EVA-02 E/14 plus": (224, 5044.89, 2264.33, 97.86),
    "ViT-B/32 + RoBERTa-B": (224, 212.72, 8.82, 97.05),
    "ViT-B/32 + XLM-R-B": (224, 366.12, 8.82, 97.05),
    "ViT-H/14 + XLM-R-L": (224, 1193.01, 334.59, 336.42),
    "ViT-B/32 + NLLB-600M": (224, 501.89, 8.82, 360.78),
    "ViT-H/14 + NLLB-1.3B": (224, 1399.22, 334.59, 1133.87),
    "MobileCLIP-B": (224, 149.78, None, 5.96),
    "SigLIP B/16": (224, 203.16, 35.42, 11.02),
    "SigLIP B/16@256": (256, 203.2, 46.82, 11.02),
    "SigLIP B/16@256 i18n": (256, 370.63, 46.82, 11.02),
    "SigLIP B/16@384": (384, 203.45, 112.13, 11.02),
    "SigLIP B/16@512": (512, 203.79, 216.24, 11.02),
    "SigLIP L/16@256": (256, 652.15, 162.56, 39.06),
    "SigLIP L/16@384": (384, 652.48, 383.85, 39.06),
    "SigLIP So400m/14": (224, 877.36, 220.35, 13.19),
    "SigLIP So400m/14@384": (384, 877.96, 670.35, 53.13),
    "SigLIP2 B/32@256": (256, 376.86, None, None),
    "SigLIP2 B/16": (224, 375.19, 35.42, None),
    "SigLIP2 B/16@256": (256, 375.23, 46.82, None),
    "SigLIP2 B/16@384": (384, 375.48, 112.13, None),
    "SigLIP2 B/16@512": (512, 375.82, 216.24, None),
    "SigLIP2 L/16@256": (256, 881.53, 162.56, None),
    "SigLIP2 L/16@384": (384, 881.85, 383.85, None),
    "SigLIP2 L/16@512": (512, 882.31, None, None),
    "SigLIP2 So400m/14": (224, 1135.46, 220.35, None),
    "SigLIP2 So400m/14@384": (384, 1136.01, 670.35, None),
    "SigLIP2 So400m/16@256": (256, 1135.67, None, None),
    "SigLIP2 So400m/16@384": (384, 1136.04, None, None),
    "SigLIP2 So400m/16@512": (512, 1136.56, None, None),
    "SigLIP2 g-opt/16@256": (256, 1871.39, None, None),
    "SigLIP2 g-opt/16@384": (384, 1871.89, None, None),
    "SigLIP2 B/16 NaFlex": (256, 375.23, None, None),
    "SigLIP2 So400m/16 NaFlex": (256, 1135.67, None, None),
    "FG-CLIP2 B/16": (256, 375.23, None, None),  # counted, as it is for short texts
    "FG-CLIP2 L/16": (256, 881.53, None, None),
    "FG-CLIP2 So400m/16": (256, 1135.67, None, None),
    # UCSC-VLAA's configs, counted
    "OpenVision Ti/16@160": (160, 17.08, None, None),
    "OpenVision Ti/16@224": (224, 17.1, None, None),
    "OpenVision Ti/16@384": (384, 17.17, None, None),
    "OpenVision Ti/8@160": (160, 17.02, None, None),
    "OpenVision Ti/8@224": (224, 17.1, None, None),
    "OpenVision Ti/8@384": (384, 17.39, None, None),
    "OpenVision S/16@160": (160, 55.54, None, None),
    "OpenVision S/16@224": (224, 55.57, None, None),
    "OpenVision S/16@384": (384, 55.72, None, None),
    "OpenVision S/8@160": (160, 55.43, None, None),
    "OpenVision S/8@224": (224, 55.58, None, None),
    "OpenVision S/8@384": (384, 56.16, None, None),
    "OpenVision B/16@160": (160, 140.63, None, None),
    "OpenVision B/16@224": (224, 140.71, None, None),
    "OpenVision B/16@384": (384, 141.0, None, None),
    "OpenVision B/8@160": (160, 140.42, None, None),
    "OpenVision B/8@224": (224, 140.72, None, None),
    "OpenVision B/8@384": (384, 141.88, None, None),
    "OpenVision L/14@84": (84, 414.02, None, None),
    "OpenVision L/14@224": (224, 414.25, None, None),
    "OpenVision L/14@336": (336, 414.58, None, None),
    "OpenVision So400m/14@84": (84, 863.27, None, None),
    "OpenVision So400m/14@224": (224, 863.52, None, None),
    "OpenVision So400m/14@384": (384, 864.07, None, None),
    "OpenVision H/14@84": (84, 968.0, None, None),
    "OpenVision H/14@224": (224, 968.28, None, None),
    "ALIGN B7@289": (289, 172.12, None, None),  # of transformers' AlignModel(AlignConfig())
    "TIPSv2 B/14@448": (448, 195.3, None, None),  # github.com/google-deepmind/tips, README.md
}


def _rows(family, licence, languages, context, rows, source=OPEN_CLIP) -> list[Entry]:
    return [
        Entry(
            name, family, architecture, *_PROFILE[architecture][:1], context,
            *_PROFILE[architecture][1:], languages, licence, accuracy,
            source if accuracy is not None else None,
        )
        for name, architecture, accuracy in rows
    ]  # fmt: skip


ENTRIES: tuple[Entry, ...] = tuple(
    _rows("OpenAI CLIP", "MIT", "English", 77, [
        ("openai/clip-vit-base-patch32", "ViT-B/32", 63.32),
        ("openai/clip-vit-base-patch16", "ViT-B/16", 68.34),
        ("openai/clip-vit-large-patch14", "ViT-L/14", 75.54),
        ("openai/clip-vit-large-patch14-336", "ViT-L/14@336", 76.56),
        ("RN50.pt", "RN50", 59.82),
        ("RN101.pt", "RN101", 62.28),
        ("RN50x4.pt", "RN50x4", 66.27),
        ("RN50x16.pt", "RN50x16", 70.72),
        ("RN50x64.pt", "RN50x64", 73.91),
    ])
    + _rows("LAION", "MIT", "English", 77, [
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "ViT-B/32", 66.56),
        ("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "ViT-B/16", 70.23),
        ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "ViT-L/14", 75.25),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "ViT-H/14", 77.96),
        ("laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "ViT-g/14", 76.63),
        ("laion/CLIP-ViT-g-14-laion2B-s34B-b88K", "ViT-g/14", 78.47),
        ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "ViT-bigG/14", 80.09),
        ("laion/CoCa-ViT-B-32-laion2B-s13B-b90k", "CoCa ViT-B/32", 63.59),
        ("laion/CoCa-ViT-L-14-laion2B-s13B-b90k", "CoCa ViT-L/14", 75.64),
    ])
    + _rows("LAION ConvNeXt", "MIT", "English", 77, [
        ("laion/CLIP-convnext_base-laion400M-s13B-b51K", "ConvNeXt-B", 66.27),
        ("laion/CLIP-convnext_base_w-laion2B-s13B-b82K", "ConvNeXt-B wide", 70.78),
        ("laion/CLIP-convnext_base_w-laion2B-s13B-b82K-augreg", "ConvNeXt-B wide", 71.47),
        ("laion/CLIP-convnext_base_w-laion_aesthetic-s13B-b82K", "ConvNeXt-B wide", 70.99),
        ("laion/CLIP-convnext_base_w_320-laion_aesthetic-s13B-b82K", "ConvNeXt-B wide@320", 71.67),
        ("laion/CLIP-convnext_base_w_320-laion_aesthetic-s13B-b82K-augreg",
         "ConvNeXt-B wide@320", 71.28),
        ("laion/CLIP-convnext_large_d.laion2B-s26B-b102K-augreg", "ConvNeXt-L", 75.91),
        ("laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft", "ConvNeXt-L@320", 76.60),
        ("laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup", "ConvNeXt-L@320", 76.85),
        ("laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg", "ConvNeXt-XXL", 79.07),
        ("laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-rewind", "ConvNeXt-XXL", 79.31),
        ("laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup", "ConvNeXt-XXL", 79.47),
    ])
    + _rows("LAION", "MIT", "English", 77, [
        ("laion/CLIP-ViT-B-32-roberta-base-laion2B-s12B-b32k", "ViT-B/32 + RoBERTa-B", 61.71),
    ])
    + _rows("LAION", "MIT", "multilingual", 77, [
        ("laion/CLIP-ViT-B-32-xlm-roberta-base-laion5B-s13B-b90k", "ViT-B/32 + XLM-R-B", 62.36),
        ("laion/CLIP-ViT-H-14-frozen-xlm-roberta-large-laion5B-s13B-b90k",
         "ViT-H/14 + XLM-R-L", 76.95),
    ])
    + _rows("NLLB-CLIP", None, "multilingual", 77, [
        ("visheratin/nllb-clip-base-oc", "ViT-B/32 + NLLB-600M", None),
        ("visheratin/nllb-clip-large-oc", "ViT-H/14 + NLLB-1.3B", None),
    ])
    + _rows("EVA-CLIP", "MIT", "English", 77, [
        ("timm/eva_giant_patch14_clip_224.laion400m_s11b_b41k", "EVA-01 g/14", 78.52),
        ("timm/eva_giant_patch14_plus_clip_224.merged2b_s11b_b114k", "EVA-01 g/14 plus", 79.33),
        ("timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k", "EVA-02 B/16", 74.72),
        ("timm/eva02_large_patch14_clip_224.merged2b_s4b_b131k", "EVA-02 L/14", 79.77),
        ("timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k", "EVA-02 L/14@336", 80.39),
        ("timm/eva02_enormous_patch14_clip_224.laion2b_s4b_b115k", "EVA-02 E/14", None),
        ("timm/eva02_enormous_patch14_plus_clip_224.laion2b_s9b_b144k", "EVA-02 E/14 plus", None),
    ])
    + _rows("MobileCLIP", "Apple", "English", 77, [
        ("apple/MobileCLIP-B-OpenCLIP", "MobileCLIP-B", None),
        ("apple/MobileCLIP-B-LT-OpenCLIP", "MobileCLIP-B", None),
        ("timm/MobileCLIP2-B-OpenCLIP", "MobileCLIP-B", None),
    ])
    + _rows("DataComp", "MIT", "English", 77, [
        ("laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K", "ViT-B/32", 69.17),
        ("laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K", "ViT-B/32@256", 72.81),
        ("laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K", "ViT-B/16", 73.49),
        ("laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K", "ViT-L/14", 79.21),
    ])
    + _rows("DFN", "Apple", "English", 77, [
        ("apple/DFN2B-CLIP-ViT-B-16", "ViT-B/16", None),
        ("apple/DFN2B-CLIP-ViT-L-14", "ViT-L/14", None),
        ("apple/DFN5B-CLIP-ViT-H-14", "ViT-H/14", None),
        ("apple/DFN5B-CLIP-ViT-H-14-378", "ViT-H/14@378", None),
    ])
    + _rows("MetaCLIP", "CC BY-NC", "English", 77, [
        ("timm/vit_base_patch32_clip_224.metaclip_2pt5b", "ViT-B/32", None),
        ("timm/vit_base_patch16_clip_224.metaclip_2pt5b", "ViT-B/16", None),
        ("timm/vit_large_patch14_clip_224.metaclip_2pt5b", "ViT-L/14", None),
        ("timm/vit_huge_patch14_clip_224.metaclip_2pt5b", "ViT-H/14", None),
        ("timm/vit_gigantic_patch14_clip_224.metaclip_2pt5b", "ViT-bigG/14", None),
    ])
    + _rows("MetaCLIP 2", "CC BY-NC", "worldwide", 77, [
        ("timm/vit_huge_patch14_clip_224.metaclip2_worldwide", "ViT-H/14 worldwide", None),
    ])
    + _rows("SigLIP", "Apache-2.0", "English", 64, [
        ("google/siglip-base-patch16-224", "SigLIP B/16", None),
        ("google/siglip-base-patch16-256", "SigLIP B/16@256", None),
        ("google/siglip-base-patch16-384", "SigLIP B/16@384", None),
        ("google/siglip-base-patch16-512", "SigLIP B/16@512", None),
        ("google/siglip-large-patch16-256", "SigLIP L/16@256", None),
        ("google/siglip-large-patch16-384", "SigLIP L/16@384", None),
        ("google/siglip-so400m-patch14-384", "SigLIP So400m/14@384", None),
    ])
    + _rows("SigLIP", "Apache-2.0", "English", 16, [
        ("google/siglip-so400m-patch14-224", "SigLIP So400m/14", None),
    ])
    + _rows("SigLIP", "Apache-2.0", "multilingual", 64, [
        ("google/siglip-base-patch16-256-multilingual", "SigLIP B/16@256 i18n", None),
    ])
    + _rows("SigLIP 2", "Apache-2.0", "multilingual", 64, [
        ("google/siglip2-base-patch32-256", "SigLIP2 B/32@256", None),
        ("google/siglip2-base-patch16-224", "SigLIP2 B/16", None),
        ("google/siglip2-base-patch16-256", "SigLIP2 B/16@256", None),
        ("google/siglip2-base-patch16-384", "SigLIP2 B/16@384", None),
        ("google/siglip2-base-patch16-512", "SigLIP2 B/16@512", None),
        ("google/siglip2-large-patch16-256", "SigLIP2 L/16@256", None),
        ("google/siglip2-large-patch16-384", "SigLIP2 L/16@384", None),
        ("google/siglip2-large-patch16-512", "SigLIP2 L/16@512", None),
        ("google/siglip2-so400m-patch14-224", "SigLIP2 So400m/14", None),
        ("google/siglip2-so400m-patch14-384", "SigLIP2 So400m/14@384", None),
        ("google/siglip2-so400m-patch16-256", "SigLIP2 So400m/16@256", None),
        ("google/siglip2-so400m-patch16-384", "SigLIP2 So400m/16@384", None),
        ("google/siglip2-so400m-patch16-512", "SigLIP2 So400m/16@512", None),
        ("google/siglip2-giant-opt-patch16-256", "SigLIP2 g-opt/16@256", None),
        ("google/siglip2-giant-opt-patch16-384", "SigLIP2 g-opt/16@384", None),
        ("google/siglip2-base-patch16-naflex", "SigLIP2 B/16 NaFlex", None),
        ("google/siglip2-so400m-patch16-naflex", "SigLIP2 So400m/16 NaFlex", None),
    ])
    + _rows("FG-CLIP 2", "Apache-2.0", "English, Chinese", 64, [
        ("qihoo360/fg-clip2-base", "FG-CLIP2 B/16", None),
        ("qihoo360/fg-clip2-large", "FG-CLIP2 L/16", None),
        ("qihoo360/fg-clip2-so400m", "FG-CLIP2 So400m/16", None),
    ])
    + _rows("OpenVision", "Apache-2.0", "English", 80, [
        ("UCSC-VLAA/openvision-vit-tiny-patch16-160", "OpenVision Ti/16@160", 46.9),
        ("UCSC-VLAA/openvision-vit-tiny-patch16-224", "OpenVision Ti/16@224", 49.6),
        ("UCSC-VLAA/openvision-vit-tiny-patch16-384", "OpenVision Ti/16@384", 51.5),
        ("UCSC-VLAA/openvision-vit-tiny-patch8-160", "OpenVision Ti/8@160", 51.9),
        ("UCSC-VLAA/openvision-vit-tiny-patch8-224", "OpenVision Ti/8@224", 53.5),
        ("UCSC-VLAA/openvision-vit-tiny-patch8-384", "OpenVision Ti/8@384", 53.9),
        ("UCSC-VLAA/openvision-vit-small-patch16-160", "OpenVision S/16@160", 63.5),
        ("UCSC-VLAA/openvision-vit-small-patch16-224", "OpenVision S/16@224", 65.9),
        ("UCSC-VLAA/openvision-vit-small-patch16-384", "OpenVision S/16@384", 67.1),
        ("UCSC-VLAA/openvision-vit-small-patch8-160", "OpenVision S/8@160", 67.3),
        ("UCSC-VLAA/openvision-vit-small-patch8-224", "OpenVision S/8@224", 68.6),
        ("UCSC-VLAA/openvision-vit-small-patch8-384", "OpenVision S/8@384", 68.5),
        ("UCSC-VLAA/openvision-vit-base-patch16-160", "OpenVision B/16@160", 72.4),
        ("UCSC-VLAA/openvision-vit-base-patch16-224", "OpenVision B/16@224", 73.9),
        ("UCSC-VLAA/openvision-vit-base-patch16-384", "OpenVision B/16@384", 74.5),
        ("UCSC-VLAA/openvision-vit-base-patch8-160", "OpenVision B/8@160", 74.8),
        ("UCSC-VLAA/openvision-vit-base-patch8-224", "OpenVision B/8@224", 75.4),
        ("UCSC-VLAA/openvision-vit-base-patch8-384", "OpenVision B/8@384", 75.6),
        ("UCSC-VLAA/openvision-vit-large-patch14-84", "OpenVision L/14@84", 74.7),
        ("UCSC-VLAA/openvision-vit-large-patch14-224", "OpenVision L/14@224", 78.5),
        ("UCSC-VLAA/openvision-vit-large-patch14-336", "OpenVision L/14@336", 78.9),
        ("UCSC-VLAA/openvision-vit-so400m-patch14-84", "OpenVision So400m/14@84", 76.2),
        ("UCSC-VLAA/openvision-vit-so400m-patch14-224", "OpenVision So400m/14@224", 79.7),
        ("UCSC-VLAA/openvision-vit-so400m-patch14-384", "OpenVision So400m/14@384", 79.9),
        ("UCSC-VLAA/openvision-vit-huge-patch14-84", "OpenVision H/14@84", 77.4),
        ("UCSC-VLAA/openvision-vit-huge-patch14-224", "OpenVision H/14@224", 80.4),
    ], source="github.com/UCSC-VLAA/OpenVision, README.md")
    + _rows("ALIGN", None, "English", 64, [
        ("kakaobrain/align-base", "ALIGN B7@289", None),
    ])
    + _rows("TIPSv2", None, "English", 64, [
        ("google/tipsv2-b14", "TIPSv2 B/14@448", None),
    ])
)  # fmt: skip


def find(name: str) -> Entry:
    """The entry of that name.

    Raises:
        ConfigError: the table has none; the message lists those that resemble it.
    """
    for entry in ENTRIES:
        if entry.name == name:
            return entry
    parts = name.lower().replace("_", "-").split("/")[-1]
    near = [e.name for e in ENTRIES if parts in e.name.lower()]
    near = near or [e.name for e in ENTRIES if e.family.lower() in parts]
    hint = f"; it has {', '.join(near[:8])}" if near else "; see `vlm models` for all"
    raise ConfigError(f"the table of known models has no {name!r}{hint}")


# The languages of models that have few, by their codes.
_FEW = {"English": ("en",), "English, Chinese": ("en", "zh")}
# Licences that let anyone use the weights for anything.
OPEN_LICENCES = ("MIT", "Apache-2.0")


def choose(
    *,
    max_parameters: float | None = None,
    licence: str | None = None,
    language: str | None = None,
) -> list[Entry]:
    """The entries that fit, in the order of the table.

    Args:
        max_parameters: millions of both towers together. Entries without a count do not fit, nor do
            those without a licence where one is asked for: see `undecided`.
        licence: a name, or "open" for any of `OPEN_LICENCES`.
        language: a code such as "de". A model that names its languages fits those alone, the
            others every language: their authors give no lists that agree.

    Raises:
        ConfigError: nothing fits, or no entry has that licence at all.
    """
    licences = {entry.licence for entry in ENTRIES if entry.licence is not None}
    wanted: Set[str] = set(OPEN_LICENCES) if licence == "open" else {licence or ""}
    if licence is not None and not wanted & licences:
        raise ConfigError(
            f"no known model has the licence {licence!r}: choose open, "
            + ", ".join(sorted(licences))
        )
    unknown = undecided(max_parameters=max_parameters, licence=licence, language=language)
    found = [
        entry
        for entry in ENTRIES
        if _fits(entry, max_parameters, wanted if licence else None, language)
        and entry not in unknown
    ]
    if not found:
        raise ConfigError("no known model fits all of that: see `vlm models` for what there is")
    return found


def undecided(
    *,
    max_parameters: float | None = None,
    licence: str | None = None,
    language: str | None = None,
) -> list[Entry]:
    """The entries of which a fact that is asked for is not known, and that fit otherwise."""
    wanted: Set[str] | None = None
    if licence is not None:
        wanted = set(OPEN_LICENCES) if licence == "open" else {licence or ""}
    return [
        entry
        for entry in ENTRIES
        if (
            (max_parameters is not None and entry.parameters is None)
            or (licence is not None and entry.licence is None)
        )
        and _fits(entry, max_parameters, wanted, language)
    ]


def _fits(
    entry: Entry,
    max_parameters: float | None,
    licences: Set[str] | None,
    language: str | None,
) -> bool:
    """Whether an entry fits by the facts that are known of it."""
    return (
        (max_parameters is None or entry.parameters is None or entry.parameters <= max_parameters)
        and (licences is None or entry.licence is None or entry.licence in licences)
        and (language is None or language in _FEW.get(entry.languages, (language,)))
    )


def table(entries: Sequence[Entry] = ENTRIES) -> tuple[list[str], list[list[str]]]:
    """The columns and the rows of a table of entries, as text."""
    columns = ["model", "family", "architecture", "pixels", "tokens", "M params",
               "GFLOPs image", "GFLOPs text", "languages", "licence", "ImageNet %"]  # fmt: skip
    return columns, [_row(entry) for entry in entries]


def _row(e: Entry) -> list[str]:
    def number(x: float | None, digits: int = 1) -> str:
        return "" if x is None else f"{x:,.{digits}f}"

    return [
        e.name, e.family, e.architecture, str(e.image_size), str(e.context_length),
        number(e.parameters) or "unknown", number(e.image_gflops), number(e.text_gflops),
        e.languages, e.licence or "unknown", number(e.imagenet),
    ]  # fmt: skip
