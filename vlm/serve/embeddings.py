"""`/v1/embeddings`: texts and images as vectors, in the form of OpenAI's clients."""

import base64

import numpy as np
from fastapi import APIRouter

from vlm.serve.limits import Refused
from vlm.serve.protocol import (
    Embedding,
    EmbeddingsAnswer,
    EmbeddingsRequest,
    Usage,
)
from vlm.serve.service import Service, as_refused, outcomes, parts_of


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["embeddings"])

    @router.post("/embeddings")
    async def embeddings(asked: EmbeddingsRequest) -> EmbeddingsAnswer:
        """The unit-norm embedding of each text and image.

        An item that has none is an error in its place; only if none has one is the request an
        error.
        """
        service.check_model(asked.model)
        if asked.dimensions not in (None, service.model.embed_dim):
            raise Refused(
                f"the embeddings of {service.name} have {service.model.embed_dim} dimensions: "
                "leave dimensions out",
                400,
                "invalid_dimensions",
            )
        items = asked.input if isinstance(asked.input, list) else [asked.input]
        service.check_count(len(items))
        found = await service.inside(len(items), lambda: outcomes(service.submit(items)))
        if all(isinstance(row, Exception) for row in found):
            raise as_refused(found[0], "item 0")
        data = []
        for i, row in enumerate(found):
            if isinstance(row, Exception):
                data.append(service.failed(i, row))
            else:
                data.append(Embedding(index=i, embedding=written(row, asked.encoding_format)))
        texts = [
            text
            for item, row in zip(items, found, strict=True)
            if not isinstance(row, Exception) and (text := parts_of(item, "")[0]) is not None
        ]
        tokens = _count(service, texts)
        usage = Usage(prompt_tokens=tokens, total_tokens=tokens)
        return EmbeddingsAnswer(model=service.name, data=data, usage=usage)

    return router


def written(row: np.ndarray, encoding: str) -> list[float] | str:
    """An embedding as numbers, or as the base64 of little-endian float32."""
    if encoding == "float":
        return row.tolist()
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def _count(service: Service, texts: list[str]) -> int:
    longest = service.model.tokenizer.config.context_length
    return sum(min(length, longest) for length in service.model.tokenizer.lengths(texts))
