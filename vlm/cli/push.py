"""`vlm push`: upload a model to the Hugging Face Hub."""

from typing import Annotated, Literal

from tyro.conf import arg

from vlm.cli import options, runtime


def push(
    model: options.Model,
    repo: Annotated[str, arg(metavar="OWNER/NAME")],
    /,
    format: Literal["vlm", "huggingface", "open_clip"] = "vlm",
    licence: str | None = None,
    base_model: str | None = None,
    datasets: tuple[str, ...] = (),
    results: str | None = None,
    description: str = "",
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "stored"] = "float32",
    dry_run: str | None = None,
    quantize: Literal["int8", "float8"] | None = None,
) -> None:
    """Upload a model to the Hugging Face Hub, with a model card, as one commit.

    The card has the licence, training data, evaluation and config, as far as the run folder MODEL
    records them. Log in first with `hf auth login`, or set HF_TOKEN. A card that was edited on the
    Hub keeps its text.

    Examples:
      vlm push runs/openmoji me/openmoji --licence cc-by-sa-4.0
      vlm push runs/pets me/pets --format open_clip --dry-run upload

    Args:
        repo: name on the Hub; created if there is none.
        format: of the files; `vlm.load` reads all three.
        licence: Hub name of the licence, such as apache-2.0. None: that of the base model's card.
        base_model: Hub id of the model that MODEL was trained from. None: that of the run.
        datasets: Hub names of training data, besides hf:// sources of the run.
        results: results.json of vlm eval, or its folder. None: that of the run.
        description: first paragraph of the card.
        private: make a new repository private. Otherwise the account's default applies.
        revision: branch to push to; created if there is none. None: main.
        commit_message: first line of the commit. None: "Upload with vlm".
        dtype: type of the weights; stored: that of MODEL's file.
        dry_run: write all files to this new folder, and upload nothing.
        quantize: eight bits for large parameters of a vlm bundle, with a scale for each channel.
    """
    if dry_run is not None:
        options.new_folder(dry_run)
    runtime.prepare_inference()
    from vlm.bundle import load
    from vlm.cli.terminal import print_status

    address = load(model, dtype=dtype).push_to_hub(
        repo,
        format=format,
        licence=licence,
        base_model=base_model,
        datasets=datasets,
        results=results,
        description=description,
        private=private or None,
        revision=revision,
        commit_message=commit_message,
        dry_run=dry_run,
        quantize=quantize,
    )
    print_status(f"{model} is at {address}" if dry_run is None else f"the files are in {address}")
