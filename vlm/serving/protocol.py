"""Schemas of request and response bodies, compatible with the OpenAI API."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field

Number = str | int | float | bool | None


def _valid_unicode(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("a lone surrogate is not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_valid_unicode)]


class _Request(BaseModel):
    """Base of request bodies: strict types and finite numbers."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _ModelRequest(_Request):
    model: Text | None = Field(
        default=None,
        description="Optional model name from /v1/models; a different name is an error.",
    )


class _Response(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="null")


class _ListAnswer(_Response):
    object: Literal["list"] = "list"
    model: str


# ------------------------------------------------------------------------------------- items


class ImageUrl(_Request):
    url: Text = Field(description="data:image/...;base64,...")


class Item(_Request):
    """One text or image to embed, in the short form or in that of chat messages."""

    type: Literal["text", "image", "image_url"] | None = None
    text: Text | None = None
    image: Text | None = Field(default=None, description="data:image/...;base64,...")
    image_url: ImageUrl | None = None


Input = Annotated[Text, Field(description="A text, or an image as a data URL.")] | Item


PROMPT = Field(
    default=None,
    description='Name of the prompt of the model to put before texts; "" for none. Default: the '
    "model's default prompt, if it has one.",
)

# -------------------------------------------------------------------------------- embeddings


class EmbeddingsRequest(_ModelRequest):
    input: Input | Annotated[list[Input], Field(min_length=1, fail_fast=True)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(
        default=None,
        ge=1,
        description="Optional: the model's embedding dimension, or a smaller one that it was "
        "trained for (Matryoshka).",
    )
    prompt: Text | None = PROMPT
    user: Text | None = None


class Problem(_Response):
    """Error object; the message is one sentence."""

    message: str
    type: str
    code: str
    param: str | None = None


class ErrorAnswer(_Response):
    error: Problem


class Embedding(_Response):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(
        description="List of floats, or base64 of little-endian float32."
    )


class FailedItem(_Response):
    """Error of one item; other items are not affected."""

    object: Literal["error"] = "error"
    index: int
    embedding: None = None
    error: Problem


class Usage(_Response):
    prompt_tokens: int = Field(description="Number of text tokens that were encoded.")
    total_tokens: int


class EmbeddingsAnswer(_ListAnswer):
    data: list[Embedding | FailedItem]
    usage: Usage


# ---------------------------------------------------------------------------------- classify


class ClassifyRequest(_ModelRequest):
    """Images and candidate labels; an image is a data URL or an item number of the index."""

    images: Annotated[list[Text | int], Field(min_length=1, fail_fast=True)]
    labels: Annotated[list[Text], Field(min_length=1, max_length=1000, fail_fast=True)]
    templates: Annotated[list[Text], Field(min_length=1, max_length=100, fail_fast=True)] | None = (
        None
    )
    other_label: Text | None = Field(
        default=None,
        validation_alias=AliasChoices("other_label", "none"),  # none: deprecated
        description='Prompt for the class "none of these".',
    )
    multi_label: bool = False
    top: int | None = Field(default=None, ge=1)


class Score(_Response):
    label: str
    score: float


class Classified(_Response):
    object: Literal["classification"] = "classification"
    index: int
    labels: list[Score]


class ClassifyAnswer(_ListAnswer):
    rule: Literal["softmax", "sigmoid"]
    data: list[Classified | FailedItem]


# ------------------------------------------------------------------------------------ search


class Term(_Request):
    """Term of a query: exactly one of text, image and item."""

    text: Text | None = None
    image: Text | None = Field(default=None, description="data:image/...;base64,...")
    item: int | None = Field(
        default=None, description="Item number in the index, for a query by example."
    )
    weight: float = Field(
        default=1.0, ge=-1000, le=1000, description="Negative: subtract the term."
    )


class WireCondition(_Request):
    column: Text
    comparison: Literal["=", "!=", "<", "<=", ">", ">="]
    value: Text | Annotated[int, Field(ge=-(1 << 53), le=1 << 53)] | float


class SearchRequest(_ModelRequest):
    query: Text | Annotated[list[Term], Field(min_length=1, fail_fast=True)]
    k: int = Field(default=20, ge=1, le=1000)
    where: Annotated[list[WireCondition], Field(max_length=20, fail_fast=True)] = []
    min_score: float | None = Field(
        default=None, ge=-10, le=10, description="Minimum cosine similarity."
    )
    prompt: Text | None = PROMPT


class Found(_Response):
    item: int = Field(description="Item number, for /v1/items.")
    id: str | int
    score: float
    picture: bool = Field(description="Whether /v1/items/{item}/picture exists.")
    metadata: dict[str, Number]


class SearchAnswer(_ListAnswer):
    seconds: float
    data: list[Found]


class Column(_Response):
    """Metadata column: its distinct values if there are few, else the range of its values."""

    name: str
    kind: Literal["text", "number", "date"]
    values: list[Number] | None = None
    least: float | None = None
    most: float | None = None
    earliest: str | None = Field(default=None, description="First day of a column of dates.")
    latest: str | None = Field(default=None, description="Last day of a column of dates.")
    times: bool = Field(
        default=False,
        description="Whether dates are nanoseconds since 1970, rather than texts.",
    )


class IndexAnswer(_Response):
    name: str
    model: str
    count: int
    generation: str | None = Field(description="Changes when another process saves the index.")
    columns: list[Column]
    first: list[Found] = Field(description="Evenly spaced sample of items, for a start page.")


# ----------------------------------------------------------------------------------- explain


class ExplainRequest(_ModelRequest):
    image: Text | int = Field(description="Data URL, or item number of the index.")
    text: Annotated[Text, Field(min_length=1)]


class Token(_Response):
    token: str
    weight: float = Field(description="Drop of the score without this token.")


class ExplainAnswer(_Response):
    model: str
    score: float = Field(description="Cosine similarity of image and text.")
    probability: float | None = Field(
        description="Match probability, for models with the sigmoid loss."
    )
    heat: list[list[float]] = Field(description="Heat map of the whole image by rows, from 0 to 1.")
    tokens: list[Token]


# ------------------------------------------------------------------------------------ status


class ModelCard(_Response):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vlm"
    embed_dim: int
    modalities: list[Literal["image", "text"]]
    image_size: int
    context_length: int
    loss: Literal["softmax", "sigmoid"]
    index: bool = Field(description="Whether the server has an index for /v1/search.")


class ModelsAnswer(_Response):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(_Response):
    status: Literal["ok"] = "ok"
    model: str
    seconds: dict[str, float] = Field(description="Encoding time of one item in seconds, by tower.")


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in {
        400: "Invalid item or field, or a body that is not JSON.",
        401: "Missing or wrong API key.",
        403: "Request of a web page of another origin.",
        404: "Unknown model, item or index.",
        408: "Timeout while receiving the body.",
        413: "Too many bytes, items, pixels or characters.",
        415: "Body that is not application/json.",
        422: "Field of the wrong type or out of range.",
        429: "Server busy; Retry-After is the time to wait in seconds.",
        503: "Timeout, or the server is shutting down or unhealthy.",
    }.items()
}
