"""Model bundles: towers, image preprocessing and tokenizer as one object.

A saved bundle is a folder: `bundle.json` (configs of the model and its inputs),
`model.safetensors` (parameters under vlm's names) and `tokenizer.json` (the vocabulary). An adapter
is saved without its base model, and loads together with it.
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float32, Int32, UInt8

from vlm.config import LOSS_SCORES, AdapterConfig, ModelConfig
from vlm.display import FactSheet, progress_bar
from vlm.errors import CheckpointError, ConfigError
from vlm.inputs.batches import batch_size_of, pixel_batches
from vlm.inputs.opening import ImageLike, OnError, one_or_many
from vlm.inputs.preprocess import Preprocess, with_options
from vlm.inputs.tokenizer import Tokenizer
from vlm.models import adapters
from vlm.models.dual_encoder import DualEncoder
from vlm.models.running import run_batches, use_jax
from vlm.models.text import shortened
from vlm.nn.naflex import Patches
from vlm.paths import keep_compiled_programs
from vlm.sharding import replicated, shardings, to_host
from vlm.spaces import with_dimensions, with_text
from vlm.video import encode_video, video_logits
from vlm.weights import bundle_format, instantiate
from vlm.weights.adapter import AdapterOrigin, SavedAdapter, write_adapter
from vlm.weights.eight_bits import EightBits
from vlm.weights.fingerprint import fingerprint_of, fingerprint_of_model
from vlm.weights.model_facts import facts_of
from vlm.weights.push import push_to_hub
from vlm.weights.registry import open_adapter, open_model, source_of
from vlm.weights.resolution import at_context_length, at_image_size, resizing
from vlm.weights.token_check import TokenCheck
from vlm.weights.writing import TEXTS, SavedFormat, write_folder


class Bundle(FactSheet):
    """A model with its image preprocessing and tokenizer.

    Compiles once per shape: batches are padded to a power of two, and texts of a causal tower to a
    few lengths; results have no padding. A model with parameters on a mesh shards its batches over
    that mesh. A bundle that was pickled has its parameters on the default device.

    Raises:
        ConfigError: the three parts do not match.

    Example:
        >>> model.encode_image(pictures).shape, model.encode_text("a red square").shape
        ((3, 16), (1, 16))
    """

    def __init__(
        self,
        model: DualEncoder,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        name: str,
        *,
        fingerprint: str | None = None,
        source: str | None = None,
        adapter: AdapterOrigin | None = None,
        templates: Sequence[str] = (),
    ):
        instantiate.check_inputs(model.config, preprocess.config, tokenizer, name)
        use_jax()
        self.model = model
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint  # of the parameters; None until saved or loaded
        self.source = source  # argument of `load`
        self.adapter = adapter
        self.templates = tuple(templates)  # of its training; empty: unknown

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def loss(self) -> Literal["softmax", "sigmoid"]:
        """How logits become scores: by the rule of the training loss."""
        return LOSS_SCORES[self.config.loss]

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    @property
    def logit_scale(self) -> float:
        """The factor of the cosine in the logits (after the exponential)."""
        return self._affine[0]

    @property
    def logit_bias(self) -> float:
        """The bias of the logits; 0 for a model without one."""
        return self._affine[1]

    @functools.cached_property
    def _affine(self) -> tuple[float, float]:
        bias = self.model.logit_bias
        scale = math.exp(float(to_host(self.model.logit_scale[...])))
        return scale, 0.0 if bias is None else float(to_host(bias[...]))

    def encode_image(
        self,
        images: ImageLike | Iterable[ImageLike],
        batch_size: int | None = None,
        *,
        on_error: OnError | None = None,
        progress: bool = False,
    ) -> Float32[np.ndarray, "n d"]:
        """Encode images to unit-norm embeddings: PIL images, paths, bytes or uint8 arrays.

        Any iterable is streamed: at most two batches of pixels are in memory, and the next one is
        decoded on threads during computation. `batch_size` defaults to 32 on CPU, else 256.
        `on_error` is called with the position and error of each unreadable image, in order; such
        an image has no row. Without it, the first error is raised. `progress` shows a bar in
        terminals and notebooks.

        Raises:
            ConfigError: a model of videos, texts alone, or several vectors of an image (BLIP-2).
            DataError: an image is missing or unreadable; the message names it.
        """
        instantiate.check_images(self.model, self.name)
        size = batch_size_of(batch_size)
        batches = pixel_batches(self.preprocess, one_or_many(images), size, on_error)
        with progress_bar("encode images", images, shown=progress) as done:
            return self._run(self._image_program, batches, size, done)

    def encode_text(
        self,
        texts: str | Iterable[str],
        batch_size: int | None = None,
        *,
        prompt: str | None = None,
        progress: bool = False,
    ) -> Float32[np.ndarray, "n d"]:
        """Encode texts to unit-norm embeddings.

        Long texts are truncated; `tokenizer.count_truncated` counts them. `prompt` names one of
        `prompts` to put before texts; None: the default one; "": none. `progress` shows a bar.

        Raises:
            ConfigError: an unknown prompt.
            DataError: a text is not a string.
        """
        instantiate.check_tower(self.model, "text", self.name)
        size = batch_size_of(batch_size)
        stream = iter([texts] if isinstance(texts, str) else texts)
        chunks = iter(lambda: list(itertools.islice(stream, size)), [])
        batches = (shortened(self.tokenizer(chunk, prompt), self.config.text) for chunk in chunks)
        with progress_bar("encode texts", texts, shown=progress) as done:
            return self._run(self._text_program, batches, size, done)

    encode_video, video_logits = encode_video, video_logits
    with_text, with_dimensions = with_text, with_dimensions

    def encode_pixels(self, rows: UInt8[np.ndarray, "n h w 3"] | Patches) -> Float32[Any, "n d"]:
        """Encode one batch of `preprocess.collate` to unit-norm embeddings."""
        instantiate.check_images(self.model, self.name)
        count = len(rows.mask if isinstance(rows, Patches) else rows)
        return self._run(self._image_program, [rows], 1 << (count - 1).bit_length())

    def encode_tokens(self, tokens: Int32[np.ndarray, "n l"]) -> Float32[Any, "n d"]:
        """Encode one batch of token rows to unit-norm embeddings."""
        return self._run(self._text_program, [tokens], 1 << (len(tokens) - 1).bit_length())

    @property
    def prompts(self) -> dict[str, str]:
        """Prompts of the model by name, for `encode_text` and `with_prompt`."""
        return dict(self.tokenizer.config.prompts)

    def with_prompt(self, prompt: str | None) -> "Bundle":
        """Copy the bundle with another default prompt, which all heads then use; None: no prompt.

        Raises:
            ConfigError: an unknown prompt.
        """
        other = copy.deepcopy(self)
        rules = dataclasses.replace(self.tokenizer.config, default_prompt=prompt)
        other.tokenizer = self.tokenizer.with_rules(rules)
        return other

    def with_parameters(self, parameters: nnx.State, name: str | None = None) -> "Bundle":
        """Copy the bundle with other parameters, and share its compiled programs.

        Args:
            parameters: with the structure, shapes and types of `nnx.state(bundle.model)`.
            name: of the new bundle; default: this one's.
        """
        graph, _ = self._split
        model = nnx.merge(graph, parameters)
        other = self._like(model, name=name or self.name)
        other._split = graph, parameters
        other._image_program, other._text_program = self._image_program, self._text_program
        return other

    @functools.cached_property
    def identity(self) -> str:
        """The fingerprint of the checkpoint and of truncation, without an adapter.

        Raises:
            CheckpointError: the checkpoint has moved since it was loaded.
        """
        if self.adapter is not None:
            return self.adapter.base_fingerprint or ""  # an adapter in use has one
        if self.fingerprint is not None:
            return self.fingerprint
        if self.source is not None:
            checkpoint, _ = open_model(self.source, None)
            return fingerprint_of(checkpoint.for_length(self.tokenizer.config.context_length))
        return fingerprint_of_model(self.model)

    def merged(self) -> "Bundle":
        """Merge the adapter into the kernels; returns the bundle itself if it has none."""
        if self.adapter is None:
            return self
        origin = {"fingerprint": self.fingerprint, "source": self.source}
        return self._like(adapters.merged(self.model), **origin)

    def with_adapter(self, adapter: adapters.Adapter, config: AdapterConfig) -> "Bundle":
        """Copy the bundle with another adapter; the kernels are quantized as in its config.

        Raises:
            ConfigError: the adapter is for another model.
        """
        model = adapters.quantized(self.model) if config.quantize == "int8" else self.model
        base = self.source if self.adapter is None else self.adapter.base
        model = adapters.attach(model, adapter)
        if self._mesh is not None:
            graph, state = nnx.split(model)
            state = nnx.to_pure_dict(state)
            places = shardings(state, self._mesh, self.config.partition)
            model = nnx.merge(graph, jax.device_put(state, places))
        return self._like(model, adapter=AdapterOrigin(config, base, self.identity))

    def _like(self, model: DualEncoder, **changes: Any) -> "Bundle":
        """Copy the bundle with another model."""
        kept = {"name": self.name, "templates": self.templates}
        return Bundle(model, self.preprocess, self.tokenizer, **(kept | changes))

    def save_adapter(self, folder: epath.PathLike) -> None:
        """Write the adapter alone as a small folder, which `load` opens with its base model.

        In a run of several processes, all must call this; the first one writes.

        Raises:
            ConfigError: there is no adapter, or its base model was not loaded from a checkpoint.
            CheckpointError: the folder has other contents or cannot be written.
        """
        if self.adapter is None:
            raise ConfigError(f"{self.name} has no adapter: save it with Bundle.save")
        factors = jax.tree.map(to_host, adapters.adapter_of(self.model))
        if jax.process_index() == 0:
            length, pixels = self.tokenizer.config.context_length, self.preprocess.config
            self.fingerprint = write_adapter(
                folder, factors, self.adapter, self.name, pixels, length, self.templates
            )

    def save(
        self,
        folder: epath.PathLike,
        format: SavedFormat = "vlm",
        *,
        compare_texts: int = TEXTS,
        quantize: EightBits | None = None,
    ) -> TokenCheck | None:
        """Write the bundle as a folder, or atomically replace the bundle in it.

        An adapter is merged. For transformers and open_clip, the token ids of `compare_texts` texts
        are compared, and the result is returned. All processes of a run must call this. With
        `quantize`, large parameters have eight bits with a scale for each channel, "int8" or
        "float8", which saves disk space and no memory: `load` makes float32 of them.

        Raises:
            ConfigError: an unknown `quantize`, or one for another format.
            CheckpointError: the folder has other contents or cannot be written, or the format does
                not support the model.
        """
        bundle_format.check_quantize(quantize, format)
        for tower in ("vision", "text"):
            if getattr(self.config, tower).kind != "none":
                instantiate.check_tower(self.model, tower, self.name)
        model = self.merged().model
        if jax.process_count() > 1:
            graph, state = nnx.split(model)
            model = nnx.merge(graph, jax.tree.map(to_host, state))
        if jax.process_index() != 0:
            return None
        parts = model, self.preprocess, self.tokenizer
        if format != "vlm":
            return write_folder(folder, format, *parts, compare_texts)
        written = bundle_format.write(folder, *parts, self.name, self.templates, quantize)
        if self.adapter is None and quantize is None:
            self.fingerprint = written
        return None

    push_to_hub = push_to_hub

    def __getstate__(self) -> dict[str, Any]:
        """Leave compiled programs out, and gather parameters as NumPy arrays, from a mesh too."""
        compiled = ("_split", "_mesh", "_image_program", "_text_program")
        rest = {name: value for name, value in self.__dict__.items() if name not in compiled}
        return rest | {"model": (self._split[0], jax.tree.map(to_host, self._split[1]))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        use_jax()
        graph, parameters = state["model"]
        state["model"] = nnx.merge(graph, jax.tree.map(jnp.asarray, parameters))
        vars(self).update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Bundle":
        other = self.with_parameters(self._split[1])  # arrays, which stay on a mesh, are immutable
        other.fingerprint, other.source, other.adapter = self.fingerprint, self.source, self.adapter
        return other

    @functools.cached_property
    def _split(self):
        return nnx.split(self.model)

    @functools.cached_property
    def _mesh(self) -> Mesh | None:
        meshes = (getattr(x.sharding, "mesh", None) for x in jax.tree.leaves(self._split[1]))
        return next((mesh for mesh in meshes if isinstance(mesh, Mesh) and mesh.size > 1), None)

    @functools.cached_property
    def _image_program(self):
        def encode(model: DualEncoder, pixels):
            return model.encode_image(self.preprocess.normalize(pixels))

        return self._program(encode)

    @functools.cached_property
    def _text_program(self):
        return self._program(lambda model, tokens: model.encode_text(tokens))

    def _program(self, encode):
        """Compile `encode` of parameters and a batch; on a mesh, its result is replicated."""
        graph, _ = self._split
        result = None if self._mesh is None else replicated(self._mesh)
        return jax.jit(
            lambda state, rows: encode(nnx.merge(graph, state), rows), out_shardings=result
        )

    def _run(self, program, batches, size: int, *done) -> Float32[np.ndarray, "n d"]:
        encode = functools.partial(program, self._split[1])
        return run_batches(encode, batches, size, self.embed_dim, self._mesh, *done)

    def _facts(self) -> tuple[str, dict[str, str]]:
        return self.name, facts_of(self.model, self.tokenizer)

    def __repr__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self._facts()[1].items())
        return f"Bundle({self.name}: {facts})"


def load(
    model: epath.PathLike,
    *,
    image_size: int | None = None,
    context_length: int | None = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    revision: str | None = None,
    tower: instantiate.Tower = "both",
    resize_backend: Literal["pillow", "tensor", "tensorflow"] | None = None,
    decode: Literal["intended", "reference"] | None = None,
    base: epath.PathLike | None = None,
    architecture: str | None = None,
) -> Bundle:
    """Load a model: a bundle, a run folder, an adapter, or a public checkpoint.

    A public checkpoint is a name of `vlm models` such as "ViT-B-32", a Hub id, a folder in the
    layout of transformers or open_clip, a big_vision `.npz` or an OpenAI `.pt`. Local paths win.
    A checkpoint with one tower, such as DINOv2, gives a bundle that encodes images alone.

    Args:
        image_size: another resolution, in pixels; position embeddings are resized.
        context_length: another number of tokens in a text; position embeddings are truncated or
            interpolated as in the model's own code, or FG-CLIP 2's for long texts (65 to 196).
        dtype: of parameters and computation: "float32", "bfloat16", "float16", or "stored", the
            type of the file.
        mesh: shard the parameters over this mesh by the rules of `vlm.sharding`; each host reads
            the checkpoint, a tensor at a time, and keeps its shard. All hosts must encode the same
            inputs, and all get the embeddings. None: the default device.
        revision: of a Hub model: a branch, tag or commit. None: the commit that this machine
            fetched first, without a network; "main" fetches the newest.
        tower: "vision" or "text" loads one tower alone.
        resize_backend: implementation of the resize, if the checkpoint's files name another one
            than its authors used: "pillow"; "tensor", as torchvision and transformers 5 for uint8
            tensors; "tensorflow", as big_vision. None: that of the files.
        decode: conversion of image files to RGB, "intended" or "reference": see `PreprocessConfig`.
        base: path of an adapter's base model, if it has moved. None: the recorded path.
        architecture: its name, for weights alone or dino.txt: open_clip's, timm's or a recipe's.

    Raises:
        CheckpointError: the checkpoint is missing, corrupt or of another architecture; or an
            adapter does not belong to `base`.
        ConfigError: a size that the model does not support.
        ShardingError: a mesh with unknown axes.

    Example:
        >>> model.save(folder / "my-bundle")
        >>> vlm.load(folder / "my-bundle").embed_dim
        16
    """
    keep_compiled_programs()
    if architecture is None and (saved := open_adapter(model)) is not None:
        sizes = {"image_size": image_size, "context_length": context_length}
        options = {"dtype": dtype, "mesh": mesh, "tower": tower, "decode": decode}
        return _load_adapted(saved, base, sizes, resize_backend=resize_backend, **options)
    instantiate.check_dtype(dtype)
    checkpoint, name = open_model(model, revision, architecture)
    rules = checkpoint.config.partition
    place = None if mesh is None else instantiate.parameter_shardings(mesh, rules)
    checkpoint = checkpoint.for_length(context_length)
    size = checkpoint.image_size if image_size is None else image_size
    config, preprocess = at_image_size(checkpoint.config, checkpoint.preprocess, size)
    preprocess = with_options(preprocess, resize_backend, decode)
    config, tokenizer = at_context_length(
        config,
        checkpoint.tokenizer,
        checkpoint.context_length if context_length is None else context_length,
        checkpoint.text_positions,
    )
    positions = checkpoint.positions, checkpoint.text_positions
    kind = instantiate.parameter_dtype(dtype, checkpoint.tensors)
    filled = instantiate.fill_towers(
        instantiate.abstract_model(config, kind),
        resizing(checkpoint.rules, checkpoint.config, config, *positions),
        checkpoint.tensors,
        tower,
        dtype=kind,
        placement=place,
        ignored=checkpoint.ignored,
    )
    return Bundle(
        filled,
        Preprocess(preprocess),
        tokenizer,
        name,
        fingerprint=checkpoint.fingerprint if config == checkpoint.config else None,
        source=source_of(model) if revision is None and architecture is None else None,
        templates=bundle_format.templates_of(model),
    )


def _load_adapted(
    saved: SavedAdapter, base: epath.PathLike | None, sizes: dict[str, int | None], **options: Any
) -> Bundle:
    """Load an adapter with its base model, at the size of its training."""
    place, pixels = saved.origin.base if base is None else base, saved.preprocess
    if place is None:
        raise CheckpointError(
            f"the adapter {saved.where} does not record its base model: give it with base"
        )
    if pixels is not None:
        trained = {"image_size": pixels.image_size, "context_length": saved.context_length}
        sizes = {name: sizes[name] or trained[name] for name in sizes}
    try:
        model = load(place, **sizes, **options).merged()
    except CheckpointError as error:
        raise CheckpointError(
            f"the base model of the adapter {saved.where} cannot be loaded: {error} (give its path "
            "with base if it has moved)"
        ) from None
    if pixels is not None and pixels.image_size == model.preprocess.config.image_size:
        pixels = with_options(pixels, options["resize_backend"], options["decode"])
        model.preprocess = Preprocess(pixels)
    return adapted(model, saved)


def adapted(bundle: Bundle, saved: SavedAdapter) -> Bundle:
    """Attach a saved adapter to a bundle.

    Raises:
        CheckpointError: the adapter belongs to another model.
    """
    saved.check_base(bundle.identity, bundle.name)
    factors = saved.factors_for(bundle.model, bundle.tokenizer)
    new = bundle.with_adapter(factors, saved.origin.config)
    new.name, new.fingerprint, new.source = saved.name, saved.fingerprint, saved.where
    new.templates = bundle_format.templates_of(saved.where) or new.templates
    return new
