"""`vlm data`: a look at a data set, its index, and the same data as shards that train fast."""

import base64
import json as jsonlib
from typing import Annotated, Any, Literal

from tyro.conf import arg

from vlm.cli import parse
from vlm.cli.parse import UsageError

Source = Annotated[str, arg(metavar="SOURCE")]


def show_main(args: list[str]) -> None:
    parse.call(show, "vlm data show", args)


def reinforce_main(args: list[str]) -> None:
    parse.call(reinforce, "vlm data reinforce", args)


def prepare_main(args: list[str]) -> None:
    parse.call(prepare, "vlm data prepare", args)


def index_main(args: list[str]) -> None:
    parse.call(index, "vlm data index", args)


def show(
    source: Source,
    /,
    out: str | None = None,
    split: str = "train",
    image: str = "image",
    captions: tuple[str, ...] = ("caption",),
    label: str | None = None,
    data_dir: str | None = None,
    context_length: int = 77,
    limit: int = 1000,
    thumbnails: int = 60,
    json: bool = False,
) -> None:
    """Say what a data set holds, and write a page of its images with their captions.

    Examples:
      vlm data show openmoji
      vlm data show 'shards/{00000..00099}.tar' --out look.html
      vlm data show tfds:cifar10 --label label

    Args:
        source: as data.source of a config: a name, a table, a folder, shards, a bucket.
        out: the page; None writes none.
        split: which one.
        image: the feature with the image.
        captions: the features with texts: columns, extensions (txt) or fields of the JSON.
        label: a class label instead of captions.
        data_dir: where prepared data lies.
        context_length: tokens (of CLIP's vocabulary) beyond which a caption counts as too long.
        limit: examples that are looked at, from the first on.
        thumbnails: images on the page.
        json: print the figures as one JSON object.
    """
    from vlm.cli.terminal import print_status, progress
    from vlm.config import DataConfig, PreprocessConfig
    from vlm.data.dataset_stats import dataset_stats
    from vlm.inputs.preprocess import Preprocess
    from vlm.weights.vocabularies import clip_tokenizer

    if limit < 1:
        raise UsageError(f"--limit {limit} looks at nothing: give at least 1")
    config = DataConfig(
        source=source,
        train_split=split,
        eval_split=None,
        image=image,
        captions=captions,
        label=label,
        data_dir=data_dir,
    )
    found = dataset_stats(
        config,
        split,
        Preprocess(PreprocessConfig()),
        clip_tokenizer(context_length),
        limit=limit,
        thumbnails=thumbnails if out else 0,
        progress=lambda reads, total: progress(reads, "looking", total),
    )
    figures = found.summary()
    if out:
        with open(out, "w", encoding="utf-8") as f:
            f.write(_page(found, figures))
        print_status(f"page {out}")
    if json:
        print(jsonlib.dumps(figures))
        return
    for name, value in _rows(found, figures):
        print(f"{name:<22}{value}")


def prepare(
    source: Source,
    out: Annotated[str, arg(metavar="OUT")],
    /,
    format: Literal["tar", "array_record"] = "tar",
    examples: int = 10_000,
    short_side: int | None = None,
    quality: int = 92,
    deduplicate: bool = False,
    min_side: int = 0,
    split: str = "train",
    image: str = "image",
    captions: tuple[str, ...] = ("caption",),
    label: str | None = None,
    filters: tuple[str, ...] = (),
    data_dir: str | None = None,
    beam: tuple[str, ...] = (),
) -> None:
    """Write a data set as shards: resized, without duplicates, filtered, with checksums.

    A command that was stopped goes on where it was when it is run again.

    Examples:
      vlm data prepare photos/ shards/ --short-side 512 --deduplicate
      vlm data prepare 'raw/{000..099}.tar' shards/ --filters 'aesthetic>=5' 'language=en,de'
      vlm data prepare 'raw/{000..099}.tar' shards/ --beam runner=FlinkRunner flink_master=host:8081

    Args:
        source: as data.source of a config.
        out: a folder of its own for the shards.
        format: WebDataset tars, or ArrayRecord files for random access.
        examples: of a shard.
        short_side: pixels; larger images are made smaller, as JPEG.
        quality: of those JPEG files.
        deduplicate: leave out images that look like one before them.
        min_side: pixels; smaller images are left out.
        split: which one.
        image: the feature with the image.
        captions: the features with texts, the first of which is a tar's .txt; all features are
            kept under their names.
        label: a class label instead of captions.
        filters: conditions such as 'score>=0.3', 'score<=9' or 'language=en,de'.
        data_dir: where prepared data lies.
        beam: options of Apache Beam (extra `beam`), as NAME=VALUE: its workers, who must all see
            source and out, write the same shards. One that was stopped begins anew.
    """
    from vlm.cli.terminal import counter, print_status
    from vlm.config import DataConfig, PreprocessConfig
    from vlm.data.prepare import Preparation
    from vlm.data.prepare import prepare as write
    from vlm.inputs.preprocess import Preprocess

    config = DataConfig(
        source=source,
        train_split=split,
        eval_split=None,
        image=image,
        captions=captions,
        label=label,
        filters=tuple(map(_filter, filters)),
        data_dir=data_dir,
    )
    wanted = Preparation(format, examples, short_side, quality, deduplicate, min_side)
    if beam:
        from vlm.data.beam import prepare as write_on_beam

        done = write_on_beam(config, split, out, wanted, beam)
    else:
        with counter("preparing") as report:
            done = write(config, split, out, wanted, Preprocess(PreprocessConfig()), report=report)
    left = ", ".join(f"{count:,} {kind}" for kind, count in done["left_out"].items())
    print(
        f"{done['examples']:,} examples in {done['shards']:,} shards in {out} "
        f"({done['bytes'] / 2**20:,.1f} MiB)" + (f"; left out: {left}" if left else "")
    )
    if dropped := done["dropped"]:
        names = ", ".join(f"{name} ({count:,} examples)" for name, count in dropped.items())
        print_status(f"features that the shards do not hold: {names}")


def index(source: Source, /, out: str | None = None) -> None:
    """Write the index that gives tar shards random access, beside them.

    Training, evaluation and `vlm data show` find it there. It is 8 bytes an example.

    Example:
      vlm data index 'shards/{00000..00099}.tar'

    Args:
        source: tar shards, with ranges, lists or *.
        out: another place for the file.
    """
    from vlm.cli.terminal import progress
    from vlm.data.shard_index import beside, write_index
    from vlm.data.storage import expand

    if ".tar" not in source:
        raise UsageError(f"{source!r} names no .tar shards: other sources need no index")
    names = expand(source)
    path = out or beside(names)
    header = write_index(
        names, path, progress=lambda items: progress(items, "indexing", len(names))
    )
    count = sum(shard[2] for shard in header["shards"])
    print(f"{path}: {count:,} examples in {len(names):,} shards")
    for fault in header["faults"]:
        print(f"{fault['kind']}: {fault['why']} ({fault.get('samples', 1):,} samples)")


def reinforce(
    data: Annotated[str, arg(metavar="CONFIG|SOURCE")],
    out: Annotated[str, arg(metavar="OUT")],
    /,
    teacher: Annotated[str, arg(metavar="MODEL")],
    augmentations: int = 4,
    seed: int = 0,
    batch_size: int = 256,
    dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Store what a teacher says of every example, changed in several ways (MobileCLIP's reinforced
    data), so that students learn from it without running it.

    Train with --distill.stored OUT: it makes the same changes again. The same command goes on
    where it was stopped.

    Example:
      vlm data reinforce configs/openmoji.py taught/ --teacher ViT-L-14/ --augmentations 8

    Args:
        data: a config, whose data and changes of images are used; or a source, as data.source.
        out: a folder of its own; an unfinished one is finished.
        teacher: a run folder, a bundle, or a public checkpoint.
        augmentations: how many changes of each example are kept.
        seed: of the changes.
        batch_size: how many the teacher embeds at a time.
        dtype: of the stored embeddings.
    """
    from vlm.cli.terminal import counter
    from vlm.config import DataConfig, load_config
    from vlm.config.files import shipped_configs
    from vlm.training.reinforce import reinforce as write

    is_config = data.endswith(".py") or data in shipped_configs()
    config = load_config(data).data if is_config else DataConfig(source=data)
    settings = {"variants": augmentations, "seed": seed, "batch_size": batch_size, "dtype": dtype}
    with counter("embedding") as progress:
        made = write(config, out, teacher, **settings, progress=progress)
    print(
        f"{made['examples']:,} examples x {made['variants']} changes, {made['width']} dimensions, "
        f"by {teacher}, in {out}"
    )


def _filter(text: str) -> Any:
    from vlm.config import FieldFilter

    try:
        if ">=" in text:
            feature, value = text.split(">=")
            return FieldFilter(feature.strip(), at_least=float(value))
        if "<=" in text:
            feature, value = text.split("<=")
            return FieldFilter(feature.strip(), at_most=float(value))
        feature, values = text.split("=")
        return FieldFilter(feature.strip(), one_of=tuple(v.strip() for v in values.split(",")))
    except ValueError:
        raise UsageError(
            f"--filters {text!r} is not a condition: write 'score>=0.3', 'score<=9' or "
            "'language=en,de'"
        ) from None


def _rows(found: Any, figures: dict[str, Any]) -> list[tuple[str, str]]:
    def spread(name: str) -> str:
        values = figures[name]
        if values is None:
            return "-"
        return (
            f"{values['median']:,.0f} (from {values['min']:,.0f} to {values['max']:,.0f}; "
            f"95% below {values['p95']:,.0f})"
        )

    bad = ", ".join(f"{count:,} {kind}" for kind, count in figures["bad"].items()) or "none"
    long = f"{found.too_long:,} of {found.good:,} exceed {found.context_length} tokens"
    return [
        ("source", found.source),
        ("holds", found.description),
        ("looked at", f"{found.looked_at:,} examples, {found.good:,} good"),
        ("features", ", ".join(f"{name} ({kind})" for name, kind in found.features.items())),
        ("captions an image", spread("captions_each")),
        ("tokens a caption", spread("tokens_each")),
        ("too long", long),
        ("width", spread("width")),
        ("height", spread("height")),
        ("bytes an image", spread("file_bytes")),
        ("duplicates", f"{found.duplicates:,}"),
        ("bad", bad),
    ]


def _page(found: Any, figures: dict[str, Any]) -> str:
    from vlm._html import render

    return render(
        "cli/dataset.html",
        title=found.source,
        lead=found.description,
        figures=dict(_rows(found, figures)),
        examples=[(base64.b64encode(data).decode(), texts[:5]) for data, texts in found.shown],
        bad=[[row[name] for name in ("kind", "where", "why")] for row in found.bad[:200]],
    )
