"""Options that several commands share, with their help texts."""

import os
from typing import Annotated

from etils import epath
from tyro.conf import arg

from vlm.cli.parse import UsageError
from vlm.paths import as_path

MODEL_HELP = "A run folder, a bundle, a Hub id, or a name of vlm models."
Model = Annotated[str, arg(metavar="MODEL", help=MODEL_HELP)]
ModelOption = Annotated[
    str | None,
    arg(
        metavar="MODEL",
        help=f"{MODEL_HELP} Default: the variable VLM_MODEL, else EVA02-B-16.",
    ),
]
NewFolder = Annotated[str, arg(metavar="OUT", help="output folder, which must not exist.")]
Images = Annotated[
    tuple[str, ...],
    arg(metavar="IMAGES...", help="files, folders (searched recursively) and globs."),
]
Labels = Annotated[
    str | None,
    arg(metavar="A,B,...", help="the names to choose from, separated by commas."),
]
LabelsFile = Annotated[
    str | None,
    arg(
        metavar="FILE",
        help="the names to choose from: one on each line of a text file; a JSON list; "
        "FILE.json:KEY, an entry of CLIP_benchmark's files; imagenet; open_clip:imagenet; or the "
        "classes of a data set, tfds:NAME, folder:PATH or wds:FOLDER.",
    ),
]
Templates = Annotated[
    tuple[str, ...],
    arg(
        metavar="TEMPLATES...",
        help="sentences in which {} stands for the label, or the name of a set: plain, photo, "
        "clip_best, siglip; or a file, as for --labels-file. Default: the model's own, else those "
        'of the data set, else "a photo of a {}.".',
    ),
]
ClassNames = Annotated[
    str | None,
    arg(
        metavar="FILE",
        help="a file with the class names for prompts: a line for each label in their order, lines "
        "LABEL<tab>NAME, or JSON. Default: labels of a data set are made readable, and others are "
        "used as they are.",
    ),
]
Video = Annotated[
    int | None,
    arg(
        metavar="FRAMES",
        help="embed video files in place of images, each by this many frames (8 is common), or by "
        "the number of a video model: see vlm.heads.VideoEncoder. Needs the extra `video`.",
    ),
]
BatchSize = Annotated[int | None, arg(help="images encoded at once. None: 32 on a CPU, else 256.")]
Root = Annotated[
    tuple[str, ...],
    arg(
        metavar="OLD=NEW...",
        help="folders of images that moved after they were indexed; OLD . is that of relative "
        "paths.",
    ),
]
Json = Annotated[bool, arg(help="print JSON on stdout; tables go to stderr.")]
Rounds = Annotated[int, arg(help="number of measurements; the best counts.")]
Beam = Annotated[
    tuple[str, ...],
    arg(
        help="options of Apache Beam (extra `beam`), as NAME=VALUE. All workers must be able to "
        "read the inputs and write OUT. The result is the same as without Beam."
    ),
]


def new_folder(out: str) -> epath.Path:
    """Return the path of an output folder.

    Raises:
        UsageError: it exists already.
    """
    folder = as_path(out)
    if folder.exists():
        raise UsageError(f"{out!r} exists already: give another folder")
    return folder


def moved_folders(root: tuple[str, ...]) -> dict[str, str]:
    """Return old and new folders of images from the values of --root, each OLD=NEW.

    A name may have "=" itself: NEW is the part after one of them that is an existing folder.

    Raises:
        UsageError: another form, or no such folder.
    """
    folders = {}
    for text in root:
        parts = text.split("=")
        pairs = [("=".join(parts[:i]), "=".join(parts[i:])) for i in range(1, len(parts))]
        known = [(old, new) for old, new in pairs if old and new and as_path(new).is_dir()]
        if len(known) != 1:
            fix = "there is no such folder" if pairs and not known else "write --root OLD=NEW"
            raise UsageError(f"--root {text!r} does not name an old and a new folder: {fix}")
        folders |= {os.path.expanduser(old): os.fspath(as_path(new)) for old, new in known}
    return folders
