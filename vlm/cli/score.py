"""`vlm data score`: CLIP scores of a data set, and the thresholds that keep a share of it."""

import json as jsonlib
from typing import Annotated, Literal

from tyro.conf import arg

from vlm.cli import options, runtime
from vlm.cli.data import Captions, DataDir, ImageFeature, Label, Source, Split
from vlm.cli.model import chosen_model
from vlm.cli.parse import UsageError

SHARES = (0.9, 0.75, 0.5, 0.25, 0.1)  # whose thresholds are printed


def score(
    source: Source,
    out: Annotated[str, arg(metavar="OUT")],
    /,
    model: options.ModelOption = None,
    keep_share: float | None = None,
    reduce: Literal["mean", "max", "first"] = "mean",
    split: Split = "train",
    image: ImageFeature = "image",
    captions: Captions = ("caption",),
    label: Label = None,
    data_dir: DataDir = None,
    batch_size: options.BatchSize = None,
    beam: options.Beam = (),
    json: options.Json = False,
) -> None:
    """Write the CLIP score of every pair, the cosine of its image and captions, to a folder.

    Train with --data.scores OUT and a filter of the feature clip_score (DFN, DataComp). A pair
    without a readable image or a caption has no score, and no filter of it passes. An interrupted
    command resumes when it is run again.

    Examples:
      vlm data score 'shards/{000..099}.tar' scores/ --keep-share 0.2
      vlm data score pairs.csv scores/ --model siglip2-base --captions alt_text
      vlm data score 'gs://b/{000..999}.tar' gs://b/scores --beam runner=FlinkRunner

    Args:
        out: a folder for the scores alone. It may be in a bucket.
        keep_share: print the filter that keeps this share of the scored pairs, such as 0.2.
        reduce: score of a pair with several captions: of their cosines the mean or the largest, or
            that of the first caption.
    """
    if keep_share is not None and not 0 < keep_share <= 1:
        raise UsageError(f"--keep-share {keep_share:g} is no share: give one above 0, at most 1")
    runtime.prepare_inference()
    from vlm.cli.terminal import counter
    from vlm.config import DataConfig
    from vlm.training import clip_score
    from vlm.weights.registry import describe

    # One caption is read in every layout, also where training would draw one of several.
    texts = () if label else captions
    config = DataConfig(
        source, split, None, image=image, captions=texts, label=label, data_dir=data_dir
    )
    with chosen_model(model) as name:
        describe(name)  # only errors of the model are those of VLM_MODEL
    with counter("scoring (parts)") as progress:
        made = clip_score.score(
            config, split, out, name,
            reduce=reduce, batch_size=batch_size, beam=beam, progress=progress,
        )  # fmt: skip
    shares = (*SHARES, *(() if keep_share is None else (keep_share,)))
    least = dict(zip(shares, clip_score.quantiles(out, shares), strict=True))
    if json:
        figures = {name: made[name] for name in ("scored", "unscored", "mean", "model")}
        print(jsonlib.dumps(figures | {"least": {f"{s:g}": v for s, v in least.items()}}))
        return
    print(
        f"{made['scored']:,} pairs scored by {name}, {made['unscored']:,} without a score, in "
        f"{out}; mean {made['mean']:.4f}"
    )
    for share in SHARES:
        print(f"  top {share:>4.0%}  clip_score >= {least[share]:.4f}")
    if keep_share is not None:
        print(
            f"to train on the top {keep_share:.4g} of them:\n"
            f"  DataConfig(source={source!r}, scores={out!r},\n"
            f'             filters=(FieldFilter("clip_score", at_least={least[keep_share]!r}),))'
        )
