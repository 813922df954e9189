"""What goes over the wire: the bodies of requests and answers, as OpenAI's clients know them."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Number = str | int | float | bool | None


def _whole(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair is no character") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]


class _Strict(BaseModel):
    """A request: a number in quotes is no number, and no number is infinite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Open(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="null")


# ------------------------------------------------------------------------------------- items


class ImageUrl(_Strict):
    url: Text = Field(description="data:image/...;base64,...")


class Item(_Strict):
    """One thing to embed: a text or an image, in our short form or in that of chat messages."""

    type: Literal["text", "image", "image_url"] | None = None
    text: Text | None = None
    image: Text | None = Field(default=None, description="data:image/...;base64,...")
    image_url: ImageUrl | None = None


Input = Annotated[Text, Field(description="A text, or an image as a data URL.")] | Item


# -------------------------------------------------------------------------------- embeddings


class EmbeddingsRequest(_Strict):
    input: Input | Annotated[list[Input], Field(min_length=1)]
    model: Text | None = Field(
        default=None, description="As /v1/models names it; checked where given."
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(
        default=None, ge=1, description="The model's own width, or left out."
    )
    user: Text | None = None


class Problem(_Open):
    """What is wrong, in one sentence."""

    message: str
    type: str
    code: str
    param: str | None = None


class ErrorAnswer(_Open):
    error: Problem


class Embedding(_Open):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="base64 is of little-endian float32.")


class FailedItem(_Open):
    """An item that has no answer; those beside it have theirs."""

    object: Literal["error"] = "error"
    index: int
    embedding: None = None
    error: Problem


class Usage(_Open):
    prompt_tokens: int = Field(description="Tokens of the texts that the model saw.")
    total_tokens: int


class EmbeddingsAnswer(_Open):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding | FailedItem]
    usage: Usage


# ---------------------------------------------------------------------------------- classify


class ClassifyRequest(_Strict):
    """Images over labels; an image is a data URL, or the number of an item of the index."""

    images: Annotated[list[Text | int], Field(min_length=1)]
    labels: Annotated[list[Text], Field(min_length=1, max_length=1000)]
    templates: Annotated[list[Text], Field(min_length=1, max_length=100)] | None = None
    none: Text | None = Field(default=None, description='A sentence for "none of these".')
    multi_label: bool = False
    top: int | None = Field(default=None, ge=1)
    model: Text | None = None


class Score(_Open):
    label: str
    score: float


class Classified(_Open):
    object: Literal["classification"] = "classification"
    index: int
    labels: list[Score]


class ClassifyAnswer(_Open):
    object: Literal["list"] = "list"
    model: str
    rule: Literal["softmax", "sigmoid"]
    data: list[Classified | FailedItem]


# ------------------------------------------------------------------------------------ search


class Term(_Strict):
    """A part of a query: exactly one of text, image and item."""

    text: Text | None = None
    image: Text | None = Field(default=None, description="data:image/...;base64,...")
    item: int | None = Field(default=None, description="The number of an item: more like this.")
    weight: float = Field(default=1.0, ge=-1000, le=1000, description="Below 0: less of it.")


class WireCondition(_Strict):
    column: Text
    comparison: Literal["=", "!=", "<", "<=", ">", ">="]
    value: Text | Annotated[int, Field(ge=-(1 << 53), le=1 << 53)] | float


class SearchRequest(_Strict):
    query: Text | Annotated[list[Term], Field(min_length=1)]
    k: int = Field(default=20, ge=1, le=1000)
    where: Annotated[list[WireCondition], Field(max_length=20)] = []
    min_score: float | None = Field(default=None, ge=-10, le=10, description="A cosine.")
    model: Text | None = None


class Found(_Open):
    item: int = Field(description="Its number, for /v1/items.")
    id: str | int
    score: float
    picture: bool = Field(description="Whether /v1/items/{item}/picture has something to show.")
    metadata: dict[str, Number]


class SearchAnswer(_Open):
    object: Literal["list"] = "list"
    model: str
    seconds: float
    data: list[Found]


class Column(_Open):
    """A column of metadata: its values where they are few, else the range of its numbers."""

    name: str
    kind: Literal["text", "number"]
    values: list[Number] | None = None
    least: float | None = None
    most: float | None = None


class IndexAnswer(_Open):
    name: str
    model: str
    count: int
    columns: list[Column]
    first: list[Found] = Field(description="A few items, evenly spaced, to begin with.")


# ----------------------------------------------------------------------------------- explain


class ExplainRequest(_Strict):
    image: Text | int = Field(description="A data URL, or the number of an item of the index.")
    text: Annotated[Text, Field(min_length=1)]
    model: Text | None = None


class Token(_Open):
    token: str
    weight: float = Field(description="How far the score falls without it.")


class ExplainAnswer(_Open):
    model: str
    score: float = Field(description="The cosine of image and text.")
    probability: float | None = Field(description="Of the pair, by a model of the sigmoid loss.")
    heat: list[list[float]] = Field(description="Rows of the map over the whole image, 0 to 1.")
    tokens: list[Token]


# ------------------------------------------------------------------------------------ status


class ModelCard(_Open):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vlm"
    embed_dim: int
    modalities: list[Literal["image", "text"]]
    image_size: int
    context_length: int
    loss: Literal["softmax", "sigmoid"]
    index: bool = Field(description="Whether /v1/search has an index to search.")


class ModelsAnswer(_Open):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(_Open):
    status: Literal["ok"] = "ok"
    model: str
    seconds: dict[str, float] = Field(description="That encoding one item took, by tower.")


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": about}
    for status, about in {
        400: "An item or a field that cannot be, or a body that is no JSON.",
        401: "No API key, or a wrong one.",
        404: "Another model, or an item that is not there.",
        408: "The body took too long to arrive.",
        413: "Too many bytes, items, pixels or characters.",
        422: "A field of the wrong type.",
        429: "Too much is waiting; Retry-After says when to ask again.",
        503: "The answer took too long, or the server is shutting down.",
    }.items()
}
