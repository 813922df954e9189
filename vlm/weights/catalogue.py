"""The known public checkpoints, as a table to choose from.

Accuracy is zero-shot ImageNet top-1, parameters and FLOPs (multiply-adds) are for one image and one
text of full length. Where no source that we could read gives a number, there is none.
"""

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
    languages: str
    licence: str
    imagenet: float | None = None  # percent
    source: str | None = None  # of the accuracy


# Architecture: image size, parameters in millions, GFLOPs of an image, GFLOPs of a text
# (open_clip docs/model_profile.csv).
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
    "ViT-H/14@378": (378, None, None, 47.09),
    "ViT-g/14": (224, 1366.68, 534.06, 47.09),
    "ViT-bigG/14": (224, 2539.57, 967.5, 97.86),
    "ViT-H/14 worldwide": (224, None, 334.59, None),
    "CoCa ViT-B/32": (224, 253.56, 9.19, 5.96),
    "CoCa ViT-L/14": (224, 638.45, 163.64, 13.3),
    "SigLIP B/16": (224, 203.16, 35.42, 11.02),
    "SigLIP B/16@256": (256, 203.2, 46.82, 11.02),
    "SigLIP B/16@256 i18n": (256, 370.63, 46.82, 11.02),
    "SigLIP B/16@384": (384, 203.45, 112.13, 11.02),
    "SigLIP B/16@512": (512, 203.79, 216.24, 11.02),
    "SigLIP L/16@256": (256, 652.15, 162.56, 39.06),
    "SigLIP L/16@384": (384, 652.48, 383.85, 39.06),
    "SigLIP So400m/14": (224, 877.36, 220.35, 13.19),
    "SigLIP So400m/14@384": (384, 877.96, 670.35, 53.13),
    "SigLIP2 B/32@256": (256, None, None, None),
    "SigLIP2 B/16": (224, None, 35.42, None),
    "SigLIP2 B/16@256": (256, None, 46.82, None),
    "SigLIP2 B/16@384": (384, None, 112.13, None),
    "SigLIP2 B/16@512": (512, None, 216.24, None),
    "SigLIP2 L/16@256": (256, None, 162.56, None),
    "SigLIP2 L/16@384": (384, None, 383.85, None),
    "SigLIP2 L/16@512": (512, None, None, None),
    "SigLIP2 So400m/14": (224, None, 220.35, None),
    "SigLIP2 So400m/14@384": (384, None, 670.35, None),
    "SigLIP2 So400m/16@256": (256, None, None, None),
    "SigLIP2 So400m/16@384": (384, None, None, None),
    "SigLIP2 So400m/16@512": (512, None, None, None),
    "SigLIP2 g-opt/16@256": (256, None, None, None),
    "SigLIP2 g-opt/16@384": (384, None, None, None),
    "SigLIP2 B/16 NaFlex": (256, None, None, None),
    "SigLIP2 So400m/16 NaFlex": (256, None, None, None),
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


def table() -> tuple[list[str], list[list[str]]]:
    """The columns and the rows of the whole table, as text."""
    columns = ["model", "family", "architecture", "pixels", "tokens", "M params",
               "GFLOPs image", "GFLOPs text", "languages", "licence", "ImageNet %"]  # fmt: skip
    return columns, [_row(entry) for entry in ENTRIES]


def _row(e: Entry) -> list[str]:
    def number(x: float | None, digits: int = 1) -> str:
        return "" if x is None else f"{x:,.{digits}f}"

    return [
        e.name, e.family, e.architecture, str(e.image_size), str(e.context_length),
        number(e.parameters), number(e.image_gflops), number(e.text_gflops), e.languages,
        e.licence, number(e.imagenet),
    ]  # fmt: skip
