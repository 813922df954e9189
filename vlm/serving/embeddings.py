"""`/v1/embeddings`: embeddings of texts and images, compatible with the OpenAI API."""

import base64

import numpy as np
from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from vlm.serving.limits import RequestError
from vlm.serving.protocol import (
    Embedding,
    EmbeddingsAnswer,
    EmbeddingsRequest,
    Input,
    Usage,
)
from vlm.serving.service import Service, outcomes, parts_of


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["embeddings"])

    @router.post("/embeddings")
    async def embeddings(body: EmbeddingsRequest) -> EmbeddingsAnswer:
        """Return the unit-norm embedding of each text and image.

        An item that fails is an error object in the list. The request fails only if all items fail.
        """
        service.check_model(body.model)
        service.check_prompt(body.prompt)
        full = service.model.embed_dim
        sizes = [full, *(size for size in service.model.config.matryoshka if size < full)]
        if body.dimensions not in (None, *sizes):
            raise RequestError(
                f"the embeddings of {service.name} have {' or '.join(map(str, sizes))} dimensions: "
                "give one of these, or omit the field dimensions",
                400,
                "invalid_dimensions",
                param="dimensions",
            )
        many = isinstance(body.input, list)
        items = body.input if isinstance(body.input, list) else [body.input]
        service.check_count(len(items), "items", "input")
        parts = [_parts(item, f"item {i}") for i, item in enumerate(items)]
        given = {i: pair for i, pair in enumerate(parts) if not isinstance(pair, RequestError)}
        service.check_characters(sum(len(text or "") for text, _ in given.values()), "input")
        images = {f"item {i}": image for i, (_, image) in given.items()}
        downloads = await service.download(images)
        results = await service.admit(
            len(items), lambda: outcomes(service.submit(parts, downloads, body.prompt))
        )
        data = service.answers(
            results,
            lambda rows: [
                Embedding(index=i, embedding=encode_embedding(row, body.encoding_format))
                for i, row in _truncated(rows, body.dimensions).items()
            ],
            [f"input[{i}]" for i in range(len(items))] if many else ["input"],
        )
        texts = [
            text
            for i, (text, _) in given.items()
            if text is not None and not isinstance(results[i], Exception)
        ]
        longest = service.model.tokenizer.config.context_length
        lengths = await run_in_threadpool(service.model.tokenizer.lengths, texts, body.prompt)
        tokens = sum(min(length, longest) for length in lengths)
        usage = Usage(prompt_tokens=tokens, total_tokens=tokens)
        return EmbeddingsAnswer(model=service.name, data=data, usage=usage)

    return router


def _truncated(rows: dict[int, np.ndarray], dimensions: int | None) -> dict[int, np.ndarray]:
    """Truncate embeddings to their first dimensions (Matryoshka), of unit norm again."""
    if dimensions is None:
        return rows
    cut = {i: row[:dimensions] for i, row in rows.items()}
    return {i: row / np.linalg.norm(row) for i, row in cut.items()}


def _parts(item: Input, name: str) -> tuple[str | None, str | None] | RequestError:
    """Return the text and the image of an item, or its error."""
    try:
        return parts_of(item, name)
    except RequestError as error:
        return error


def encode_embedding(row: np.ndarray, encoding: str) -> list[float] | str:
    """Return an embedding as a list of floats, or as base64 of little-endian float32."""
    if encoding == "float":
        return row.tolist()
    return base64.b64encode(row.astype("<f4").tobytes()).decode()
