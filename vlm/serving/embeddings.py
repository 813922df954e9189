"""`/v1/embeddings`: embeddings of texts and images, compatible with the OpenAI API."""

import base64

import numpy as np
from fastapi import APIRouter

from vlm.serving.limits import RequestError
from vlm.serving.protocol import (
    Embedding,
    EmbeddingsAnswer,
    EmbeddingsRequest,
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
        if body.dimensions not in (None, service.model.embed_dim):
            raise RequestError(
                f"the embeddings of {service.name} have {service.model.embed_dim} dimensions: "
                "omit the field dimensions",
                400,
                "invalid_dimensions",
            )
        items = body.input if isinstance(body.input, list) else [body.input]
        service.check_count(len(items))
        results = await service.admit(len(items), lambda: outcomes(service.submit(items)))
        data = service.answers(
            results,
            lambda rows: [
                Embedding(index=i, embedding=encode_embedding(row, body.encoding_format))
                for i, row in rows.items()
            ],
        )
        texts = [
            text
            for item, row in zip(items, results, strict=True)
            if not isinstance(row, Exception) and (text := parts_of(item, "")[0]) is not None
        ]
        longest = service.model.tokenizer.config.context_length
        tokens = sum(min(length, longest) for length in service.model.tokenizer.lengths(texts))
        usage = Usage(prompt_tokens=tokens, total_tokens=tokens)
        return EmbeddingsAnswer(model=service.name, data=data, usage=usage)

    return router


def encode_embedding(row: np.ndarray, encoding: str) -> list[float] | str:
    """Return an embedding as a list of floats, or as base64 of little-endian float32."""
    if encoding == "float":
        return row.tolist()
    return base64.b64encode(row.astype("<f4").tobytes()).decode()
