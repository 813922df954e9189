"""`vlm serve`: an HTTP API and a web search page for a model or an index."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from vlm.cli import options, runtime
from vlm.cli.index import is_index, model_of
from vlm.cli.model import leading_model, load_model, model_name
from vlm.cli.parse import UsageError
from vlm.cli.terminal import print_status
from vlm.errors import CheckpointError, ConfigError

KEYS = "VLM_API_KEYS"  # environment variable: keys separated by commas


def serve(
    index: Annotated[str | None, arg(metavar="INDEX")] = None,
    /,
    model: Annotated[str | None, arg(metavar="MODEL")] = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: Annotated[tuple[str, ...], arg(metavar="KEY...")] = (),
    name: str | None = None,
    tower: Literal["both", "vision", "text"] = "both",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    templates: options.Templates = (),
    max_batch: int | None = None,
    max_body_mib: int = 16,
    max_items: int = 256,
    max_megapixels: float = 32,
    max_waiting: int | None = None,
    max_connections: int = 1024,
    timeout: float = 30,
    allow_urls: bool = False,
    root: options.Root = (),
    log: Literal["none", "text", "json"] = "none",
    export: Annotated[tuple[str, ...], arg(metavar="compose OUT")] = (),
) -> None:
    """Start an HTTP API for a model, or an index with its model, and a web search page.

    The page is at /. The API has /v1/embeddings (compatible with OpenAI's), /v1/classify,
    /v1/search and /v1/models, described by /openapi.json; /healthz and /metrics are for operators.
    Requests of several clients are batched together. On SIGTERM, and when the terminal closes,
    in-flight requests are finished first.

    Examples:
      vlm serve my-index
      vlm serve --model ViT-B-32 --port 9000 --api-key SECRET
      vlm serve my-index --export compose deploy/

    Args:
        index: an index of vlm index. Default: none; the API then has no /v1/search.
        model: without an index: a run folder, a bundle, a Hub id, or a name of `vlm models`.
            Default: the variable VLM_MODEL, else EVA02-B-16. With an index: its model, if it moved.
        host: address to listen at; 0.0.0.0 is every address of this machine.
        port: port to listen at; 0 chooses a free one.
        api_key: keys that requests must send. Default: those of the variable VLM_API_KEYS.
        name: model name in the API. Default: that of the model.
        tower: without an index: load one tower, and accept only images or only texts.
        dtype: data type of matrix products and activations.
        max_batch: largest batch. Default: 32 on a CPU, else 256.
        max_body_mib: maximum size of a request body, in MiB.
        max_items: maximum number of images and texts per request.
        max_megapixels: maximum size of an image before it is resized, in megapixels.
        max_waiting: maximum queued items; further requests get 429. Default: eight batches.
        max_connections: maximum open connections, half of them from one address.
        timeout: seconds until a request fails.
        allow_urls: download images that clients give as http(s) URLs of public addresses.
        log: log each request to stderr, as text or as a line of JSON.
        export: "compose" and a folder: write a Dockerfile and a compose file with Prometheus there,
            for a server with these options, and start no server.
    """
    given = dict(locals())
    keys = api_key or tuple(key for key in os.environ.get(KEYS, "").split(",") if key.strip())
    keys = tuple(key.strip() for key in keys)
    if not all(keys):
        raise UsageError("an API key is empty: give --api-key a value")
    folder, model = _served(index, model)
    moved = options.moved_folders(root)
    if folder is None and moved:
        raise UsageError("--root is for an index, and only a model is served: leave it out")
    if folder is not None and tower != "both":
        raise UsageError("an index needs both towers: leave --tower out")
    if export:
        from vlm.cli.serve_export import export_compose

        export_compose(serve, given, folder, model_name(model), keys, moved)
        return
    runtime.prepare_inference()
    try:
        from vlm.serving.limits import Limits
        from vlm.serving.server import LOOPBACK, bind
        from vlm.serving.server import serve as run
    except ImportError as error:
        raise _extra_missing(error) from None
    taken = bind(host, port)  # before loading the model, which may take minutes
    try:
        from vlm.serving.app import create_app
        from vlm.serving.explain import warm_up
        from vlm.serving.request_log import start_request_log
    except ImportError as error:
        raise _extra_missing(error) from None

    print_status(f"loading {model_name(model)}")
    bundle = load_model(model, tower=tower, dtype=dtype)
    largest = max_batch or _largest_batch()
    limits = Limits(
        body_bytes=max_body_mib << 20,
        items=max_items,
        pixels=int(max_megapixels * 1e6),
        waiting=max_waiting or max(8 * largest, max_items),
        waiting_bytes=4 * (max_body_mib << 20),
        connections=max_connections,
        seconds=timeout,
        urls=allow_urls,
    )
    app = create_app(
        bundle,
        index=folder,
        name=name,
        limits=limits,
        keys=keys,
        templates=templates or None,
        local=host in LOOPBACK and not keys,
        max_batch=largest,
        moved=moved,
    )
    app.state.service.model.warm_up(lambda what: print_status(f"compiling for {what}"))
    print_status("compiling for heat maps")
    warm_up(bundle)
    if host not in LOOPBACK and not keys:
        print_status("everyone who can reach this machine has access: --api-key KEY requires a key")
    start_request_log(log)
    run(app, host, port, taken=taken, ready=lambda url: print_status(f"serving at {url}"))


def _largest_batch() -> int:
    import jax

    return 32 if jax.default_backend() == "cpu" else 256


def _served(index: str | None, model: str | None) -> tuple[Path | None, str | None]:
    """Return the folder of the index, if there is one, and the model.

    Raises:
        CheckpointError: there is no such index, or it does not record its model.
    """
    model, places = leading_model("vlm serve", model, () if index is None else (index,), 0)
    if not places:
        return None, model
    folder = Path(places[0]).expanduser()
    if not is_index(folder):
        raise CheckpointError(
            f"there is no index {places[0]!r}: check the path, build one with vlm index IMAGES "
            "OUT, or give a model with --model MODEL"
        )
    return folder, model or model_of(folder)


def _extra_missing(error: ImportError) -> Any:
    if error.name and error.name.partition(".")[0] == "vlm":
        return error
    return ConfigError(
        f"vlm serve needs {error.name}, which is not installed: pip install 'vlm-jax[serve]'"
    )
