"""`vlm data`: statistics of a data set, its index, its shards, and teacher embeddings."""

import base64
import json as jsonlib
from typing import Annotated, Any, Literal

from tyro.conf import arg

from vlm._deprecation import warn
from vlm.cli import options, runtime
from vlm.cli.model import chosen_model, load_model
from vlm.cli.parse import UsageError

Source = Annotated[
    str,
    arg(
        metavar="SOURCE",
        help="as data.source of a config: a name, a table, a folder, shards, a bucket.",
    ),
]
NewShards = Annotated[str, arg(metavar="OUT")]
Split = Annotated[str, arg(help="name of the split.")]
ImageFeature = Annotated[str, arg(help="the feature with the image.")]
Captions = Annotated[
    tuple[str, ...],
    arg(
        help="the features with texts: columns, extensions (txt) or fields of the JSON. The first "
        "becomes the .txt of tar shards."
    ),
]
Label = Annotated[str | None, arg(help="the feature with a class label, in place of captions.")]
DataDir = Annotated[str | None, arg(help="folder of prepared data.")]


def _config(source: str, split: str, **fields: Any) -> Any:
    from vlm.config import DataConfig

    return DataConfig(source=source, train_split=split, eval_split=None, **fields)


def show(
    source: Source,
    /,
    out: str | None = None,
    split: Split = "train",
    image: ImageFeature = "image",
    captions: Captions = ("caption",),
    label: Label = None,
    data_dir: DataDir = None,
    context_length: int = 77,
    limit: int = 1000,
    thumbnails: int = 60,
    batch_size: int | None = None,
    weight_column: str | None = None,
    json: options.Json = False,
) -> None:
    """Print statistics of a data set, and write a page of images with their captions.

    Of a config file (.py or .json) whose data is a mixture, it prints the fraction of the samples
    from each part.

    Examples:
      vlm data show openmoji
      vlm data show 'shards/{00000..00099}.tar' --out look.html
      vlm data show tfds:cifar10 --label label

    Args:
        out: write a page of images and captions to this HTML file. None: no page.
        context_length: tokens (of CLIP's vocabulary) beyond which a caption counts as too long.
        limit: number of examples to read, from the start.
        thumbnails: number of images on the page.
        batch_size: of data that training reads as a stream: measure the distinct classes or
            captions in batches of this size. None: 1,024, and not for remote data.
        weight_column: show how often examples are drawn with these weights: see
            data.weight_column.
    """
    from vlm.cli.terminal import print_status, progress
    from vlm.config import PreprocessConfig
    from vlm.data.dataset_stats import dataset_stats, stream_mixing, weights_description
    from vlm.inputs.preprocess import Preprocess
    from vlm.paths import is_remote
    from vlm.weights.vocabularies import clip_tokenizer

    if limit < 1:
        raise UsageError(f"--limit {limit} reads nothing: give at least 1")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is empty: give at least 1")
    if source.endswith((".py", ".json")) and (mixture := _mixture_of(source)) is not None:
        return _show_shares(mixture, batch_size or 1024, json)
    fields = {"image": image, "captions": captions, "label": label, "data_dir": data_dir}
    config = _config(source, split, weight_column=weight_column, **fields)
    stats = dataset_stats(
        config,
        split,
        Preprocess(PreprocessConfig()),
        clip_tokenizer(context_length),
        limit=limit,
        thumbnails=thumbnails if out else 0,
        progress=lambda reads, total: progress(reads, "reading", total),
    )
    if batch_size or not is_remote(source):
        stats.mixing = stream_mixing(
            config,
            batch_size or 1024,
            lambda items, total: progress(items, "measuring the mixing", total),
        )
    if weight_column is not None:
        stats.weights = weights_description(config)
    figures = stats.summary()
    if out:
        with open(out, "w", encoding="utf-8") as f:
            f.write(_page(stats, figures))
        print_status(f"page {out}")
    if json:
        print(jsonlib.dumps(figures))
        return
    for name, value in _rows(stats, figures):
        print(f"{name:<22}{value}")


def _mixture_of(file: str) -> Any:
    """Return the data of a config file if it is a mixture; None for a table (.json) or no mixture.

    Raises:
        UsageError: the data of a Python config is no mixture.
    """
    from vlm.config import load_config
    from vlm.errors import ConfigError

    try:
        data = load_config(file).data
    except ConfigError:
        if file.endswith(".json"):
            return None
        raise
    if not data.mixture:
        raise UsageError(f"the data of {file} is no mixture: give its source, {data.source}")
    return data


def _show_shares(config: Any, batch_size: int, json: bool) -> None:
    """Print the fraction of the samples from each part of a mixture."""
    from vlm.data.mixture import Mixture
    from vlm.data.sources import open_stream

    mixture = open_stream(config, batch_size, seed=0, process_index=0, process_count=1)
    assert isinstance(mixture, Mixture)
    rows = [
        {"source": str(of.source), "share": float(share), "examples": part.examples}
        for of, share, part in zip(config.mixture, mixture.shares, mixture.parts, strict=True)
    ]
    if json:
        print(jsonlib.dumps(rows))
        return
    for row in rows:
        print(f"{row['share']:>6.1%} of the samples  {row['examples']:,} examples  {row['source']}")


def prepare(
    source: Source,
    out: NewShards,
    /,
    format: Literal["tar", "array_record", "clip_benchmark"] = "tar",
    examples: int = 10_000,
    short_side: int | None = None,
    quality: int = 92,
    deduplicate: bool = False,
    near_duplicates: int | None = None,
    max_similarity: float | None = None,
    model: options.ModelOption = None,
    against: str | None = None,
    against_split: str = "test",
    against_image: str = "image",
    min_side: int = 0,
    max_aspect: float | None = None,
    min_words: int = 0,
    min_characters: int = 0,
    max_characters: int | None = None,
    languages: tuple[str, ...] = (),
    language_model: str | None = None,
    split: Split = "train",
    image: ImageFeature = "image",
    captions: Captions = ("caption",),
    label: Label = None,
    filters: tuple[str, ...] = (),
    scores: str | None = None,
    data_dir: DataDir = None,
    beam: options.Beam = (),
) -> None:
    """Write a data set as shards: resized, deduplicated, filtered, with checksums.

    An interrupted command resumes when it is run again; with --beam it restarts. All features are
    kept under their names. The number of examples that each filter left out is printed, and stored
    in OUT/totals.json.

    Examples:
      vlm data prepare photos/ shards/ --short-side 512 --near-duplicates 6 --against evals/
      vlm data prepare 'raw/{000..099}.tar' shards/ --filters 'aesthetic>=5' --languages en de
      vlm data prepare imagenet/ evals/imagenet1k --split val --label label --format clip_benchmark
      vlm data prepare 'raw/{000..099}.tar' shards/ --beam runner=FlinkRunner flink_master=host:8081

    Args:
        out: a folder for the shards alone.
        format: WebDataset tars; ArrayRecord files for random access; or a folder in
            CLIP_benchmark's layout for evaluation, with class names and an index.
        examples: number of examples in a shard.
        short_side: length of the short side in pixels; larger images are reduced, and saved as
            JPEG. None: images are kept as they are.
        quality: quality of those JPEG files, from 1 to 100.
        deduplicate: skip images that look the same as an earlier one.
        near_duplicates: skip images whose 64-bit perceptual hash differs from that of an earlier
            one in at most this many bits; 6 finds most resized and re-encoded photographs. None:
            keep them.
        max_similarity: skip images whose embedding by --model has at least this cosine with an
            earlier one, such as 0.95. None: keep them.
        against: an evaluation set, as data.source: skip images that one of the three options above
            finds in it. Of a folder with images, all are used.
        against_split: name of its split.
        against_image: its feature with the image.
        min_side: smallest side in pixels; smaller images are skipped.
        max_aspect: largest ratio of long to short side; other images are skipped.
        min_words: skip examples whose captions all have fewer words.
        min_characters: skip examples whose captions all have fewer characters.
        max_characters: skip examples whose captions all have more characters.
        languages: codes such as en; skip examples with no caption in one of them (extra
            `language`: lid.176 of fastText).
        language_model: file of another fastText model of languages.
        filters: conditions such as 'score>=0.3', 'score<=9' or 'language=en,de'.
        scores: folder of vlm data score, for a filter such as 'clip_score>=0.28'.
    """
    from vlm.cli.terminal import counter, print_status
    from vlm.config import PreprocessConfig
    from vlm.data.prepare import Preparation
    from vlm.data.prepare import prepare as write
    from vlm.inputs.preprocess import Preprocess

    if model is not None and max_similarity is None:
        raise UsageError("--model is for --max-similarity: set both, or neither")
    kept = tuple(map(_filter, filters))
    fields = {"image": image, "captions": captions, "label": label, "data_dir": data_dir}
    config = _config(source, split, filters=kept, scores=scores, **fields)
    wanted = Preparation(
        format,
        examples,
        short_side,
        quality,
        deduplicate,
        min_side,
        max_aspect=max_aspect,
        min_words=min_words,
        min_characters=min_characters,
        max_characters=max_characters,
        languages=languages,
        language_model=language_model,
        near_duplicates=near_duplicates,
        max_similarity=max_similarity,
        against=against,
        against_split=against_split,
        against_image=against_image,
    )
    if beam:
        from vlm.data.beam import prepare as write_on_beam

        done = write_on_beam(config, split, out, wanted, beam)
    else:
        embedder = None
        if max_similarity is not None:
            from vlm.heads.similar_images import ImageEmbedder

            runtime.prepare_inference()
            embedder = ImageEmbedder(load_model(model, tower="vision"), max_similarity)
        with counter("preparing") as report:
            done = write(
                config,
                split,
                out,
                wanted,
                Preprocess(PreprocessConfig()),
                embedder=embedder,
                report=report,
            )
    skipped = ", ".join(f"{count:,} {kind}" for kind, count in done["left_out"].items())
    print(
        f"{done['examples']:,} examples in {done['shards']:,} shards in {out} "
        f"({done['bytes'] / 2**20:,.1f} MiB)" + (f"; left out: {skipped}" if skipped else "")
    )
    if dropped := done["dropped"]:
        names = ", ".join(f"{name} ({count:,} examples)" for name, count in dropped.items())
        print_status(f"features that are not in the shards: {names}")


def index(source: Source, /, out: str | None = None) -> None:
    """Write the index that gives tar shards random access, beside them.

    Training, evaluation and `vlm data show` find it there. It takes 8 bytes per example.

    Example:
      vlm data index 'shards/{00000..00099}.tar'

    Args:
        source: tar shards, with ranges, lists or *, or their folder.
        out: path of the index. None: beside the shards.
    """
    from vlm.data.layouts import find_layout
    from vlm.data.shard_index import beside
    from vlm.data.sources import kind_of
    from vlm.data.storage import expand

    if kind_of(source) != "tar":
        raise UsageError(f"{source!r} has no .tar shards: other sources need no index")
    layout = find_layout(source)
    parts = list(layout.splits.values()) if layout else [expand(source)]
    if out and len(parts) > 1:
        raise UsageError(f"{source} has {len(parts)} splits with an index each: leave out --out")
    for names in parts:
        _index_shards(names, out or beside(names))


def _index_shards(names: list[str], path: str) -> None:
    """Write the index of some shards, and print its length and faults."""
    from vlm.cli.terminal import progress
    from vlm.data.shard_index import write_index

    header = write_index(
        names, path, progress=lambda items: progress(items, "indexing", len(names))
    )
    count = sum(shard[2] for shard in header["shards"])
    print(f"{path}: {count:,} examples in {len(names):,} shards")
    for fault in header["faults"]:
        print(f"{fault['kind']}: {fault['why']} ({fault.get('samples', 1):,} samples)")


def reinforce(
    data: Annotated[str, arg(metavar="CONFIG|SOURCE")],
    out: NewShards,
    /,
    model: options.ModelOption = None,
    augmentations: int = 4,
    seed: int = 0,
    batch_size: int = 256,
    dtype: Literal["float32", "float16"] = "float32",
    teacher: Annotated[str | None, arg(metavar="MODEL")] = None,
) -> None:
    """Store teacher embeddings of every example in several augmentations (MobileCLIP's reinforced
    data), so that a student can be distilled without running the teacher.

    Train with --distill.stored OUT, which repeats these augmentations. An interrupted command
    resumes when it is run again.

    Example:
      vlm data reinforce configs/openmoji.py taught/ --model ViT-L-14 --augmentations 8

    Args:
        data: a config, whose data and augmentations are used; or a source, as data.source.
        out: a folder for the embeddings alone.
        augmentations: number of augmentations of each example.
        seed: random seed of the augmentations.
        batch_size: batch size of the teacher.
        dtype: type of the stored embeddings.
        teacher: deprecated name of --model.
    """
    if teacher is not None:
        warn("the option --teacher", "--model")
    from vlm.cli.terminal import counter
    from vlm.config import DataConfig, load_config
    from vlm.config.files import shipped_configs
    from vlm.training.reinforce import reinforce as write
    from vlm.weights.registry import describe

    is_config = data.endswith(".py") or data in shipped_configs()
    config = load_config(data).data if is_config else DataConfig(source=data)
    settings = {"variants": augmentations, "seed": seed, "batch_size": batch_size, "dtype": dtype}
    with chosen_model(model or teacher) as name:
        describe(name)  # only errors of the model are those of VLM_MODEL
    with counter("embedding") as progress:
        made = write(config, out, name, **settings, progress=progress)
    print(
        f"{made['examples']:,} examples x {made['variants']} augmentations, {made['width']} "
        f"dimensions, by {name}, in {out}"
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


def _rows(stats: Any, figures: dict[str, Any]) -> list[tuple[str, str]]:
    def spread(name: str) -> str:
        values = figures[name]
        if values is None:
            return "-"
        return (
            f"{values['median']:,.0f} (from {values['min']:,.0f} to {values['max']:,.0f}; "
            f"95% below {values['p95']:,.0f})"
        )

    bad = ", ".join(f"{count:,} {kind}" for kind, count in figures["bad"].items()) or "none"
    long = f"{stats.too_long:,} of {stats.good:,} exceed {stats.context_length} tokens"
    return [
        ("source", stats.source),
        ("holds", stats.description),
        ("read", f"{stats.looked_at:,} examples, {stats.good:,} good"),
        ("features", ", ".join(f"{name} ({kind})" for name, kind in stats.features.items())),
        ("captions an image", spread("captions_each")),
        ("tokens a caption", spread("tokens_each")),
        ("too long", long),
        ("width", spread("width")),
        ("height", spread("height")),
        ("bytes an image", spread("file_bytes")),
        ("duplicates", f"{stats.duplicates:,}"),
        *([("mixing", _mixing(stats.mixing))] if stats.mixing else []),
        *([("weights", stats.weights)] if stats.weights else []),
        ("bad", bad),
    ]


def _mixing(found: Any) -> str:
    return (
        f"{found.distinct:,.0f} distinct classes or captions in a batch of {found.batch:,}, "
        f"{found.share:.0%} of random order's {found.random:,.0f}"
    )


def _page(stats: Any, figures: dict[str, Any]) -> str:
    from vlm._html import render

    return render(
        "cli/dataset.html",
        title=stats.source,
        lead=stats.description,
        figures=dict(_rows(stats, figures)),
        examples=[(base64.b64encode(data).decode(), texts[:5]) for data, texts in stats.shown],
        bad=[[row[name] for name in ("kind", "where", "why")] for row in stats.bad[:200]],
    )
