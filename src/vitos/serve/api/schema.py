"""What the server's HTTP API reads and writes: OpenAI's chat completions, with one extra field, `vitos`.

A request is read strictly: what the server would not do is refused, not ignored, so that no client takes a greedy
answer for a sampled one. What asks for nothing is accepted: null in any field, and OpenAI's parameters where they ask
for what happens anyway (`n: 1`, `temperature: 0`, `tools: []`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    StringConstraints,
    Tag,
    model_validator,
)

from vitos.core.geometry import Box
from vitos.core.registry import PLANS

TokenLimit = Annotated[int, Strict(), Field(ge=1)]
Flag = Annotated[bool, Strict()]
Zero = Annotated[float, Strict(), Field(ge=0, le=0)]
One = Annotated[float, Strict(), Field(ge=1, le=1)]
Whole = Annotated[int, Strict(), Field(ge=1, le=1)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=64)]


NOT_SERVED = "this server does not do that; leave it out"


def _nothing(value: Any) -> Any:
    if value:
        raise ValueError(NOT_SERVED)
    return value


EmptyList = Annotated[list[Any], AfterValidator(_nothing), Field(json_schema_extra={"maxItems": 0})]
EmptyMap = Annotated[dict[str, Any], AfterValidator(_nothing), Field(json_schema_extra={"maxProperties": 0})]


def _known_plan(name: str) -> str:
    if name not in PLANS.names():
        raise ValueError(f"must be one of {', '.join(PLANS.names())}")
    return name


def _box(edges: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    Box(*edges)  # its error says what a box is
    return edges


PlanName = Annotated[str, AfterValidator(_known_plan), Field(json_schema_extra={"enum": list(PLANS.names())})]
Edges = Annotated[tuple[float, float, float, float], AfterValidator(_box)]
Ignored = Annotated[Any, Field(description="Accepted and not used: it changes no answer.")]


def _or_null(wanted: dict[str, Any]) -> None:
    """Say in a JSON schema that any field but a required one may be null."""
    wanted["additionalProperties"] = {"type": "null"}
    for name in wanted["properties"].keys() - set(wanted.get("required", ())):
        wanted["properties"][name] = {"anyOf": [wanted["properties"][name], {"type": "null"}]}


class Strictly(BaseModel):
    """A part of a request; unknown fields are refused. Null is as if the field were not there."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_or_null)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


# --- request --------------------------------------------------------------------------------------------------------


class TextPart(Strictly):
    """Text of the question."""

    type: Literal["text"]
    text: str


class ImageAddress(Strictly):
    """Address of an image: `data:image/png;base64,…`, `attachment:NAME` (multipart), or `file:NAME` if allowed.

    `select` chooses a picture of the file, as in records: `frame=3`, `window=40,400`, `crop=0,0,0.5,1`.
    """

    url: str
    detail: Ignored = None
    select: Annotated[str, StringConstraints(max_length=200, pattern=r"^[^#/\\\x00]*$")] = ""


class ImagePart(Strictly):
    """An image, at its place in the question. Several are numbered in the order of the request, from 1."""

    type: Literal["image_url"]
    image_url: ImageAddress


Parts = Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(max_length=64)]


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(Strictly):
    """The question, or what was said before it; content is text, or parts. A response's message can be sent back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Parts, BeforeValidator(_parts, json_schema_input_type=str | Parts)] = []
    name: Ignored = None
    reasoning_content: Ignored = None
    tool_calls: EmptyList | None = None
    annotations: EmptyList | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.role == "user" and not self.content:
            raise ValueError("content is missing; write the question")
        if self.role != "user" and any(isinstance(part, ImagePart) for part in self.content):
            raise ValueError("content holds an image, which only a message of the user may")
        return self


def _ends_with_user(messages: list[Message]) -> list[Message]:
    if messages[-1].role != "user":
        raise ValueError("the last message must be the user's question")
    return messages


class StreamOptions(Strictly):
    """Options of a stream: whether its last event counts tokens."""

    include_usage: Flag = False
    include_obfuscation: Ignored = None


class ResponseFormat(Strictly):
    """The form of the answer, which is always text."""

    type: Literal["text"] = "text"


class BoxInImage(Strictly):
    """A box in one of several images."""

    image: TokenLimit
    box: Edges


GivenBox = Annotated[
    Annotated[Edges, Tag("box")] | Annotated[BoxInImage, Tag("box in an image")],
    Discriminator(lambda given: "box in an image" if isinstance(given, dict | BoxInImage) else "box"),
]


class Options(Strictly):
    """The request's extra field `vitos`.

    Attributes:
        plan: plan by which to answer; by default the checkpoint's own.
        boxes: evidence to use instead of the model's own, `[x1, y1, x2, y2]` in fractions of the first image, 0..1, or
            `{"image": 2, "box": [x1, y1, x2, y2]}` in another one.
        budget: share of the visual tokens to keep, in (0, 1].
    """

    plan: PlanName | None = None
    boxes: Annotated[list[GivenBox], Field(min_length=1, max_length=32)] | None = None
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    max_evidence_tokens: TokenLimit | None = None
    evidence_only: Flag = False

    @property
    def evidence(self) -> tuple[Box, ...] | None:
        """The boxes, or None."""
        if self.boxes is None:
            return None
        return tuple(Box(*b.box, b.image) if isinstance(b, BoxInImage) else Box(*b) for b in self.boxes)


class ChatRequest(Strictly):
    """Body of `POST /v1/chat/completions`."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=64), AfterValidator(_ends_with_user)]
    stream: Flag = False
    stream_options: StreamOptions | None = None
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    vitos: Options = Options()
    # OpenAI's parameters, where they ask for what happens anyway.
    temperature: Zero | None = None
    top_p: One | None = None
    n: Whole | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    response_format: ResponseFormat | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Zero | None = None
    logit_bias: EmptyMap | None = None
    tools: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Ignored = None
    functions: EmptyList | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    seed: Ignored = None
    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    metadata: Ignored = None
    store: Literal[False] | None = None

    @property
    def limit(self) -> int | None:
        """Largest number of tokens of the answer, where the request says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which the answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


# --- response -------------------------------------------------------------------------------------------------------


class FoundInImage(BaseModel):
    """Evidence in one of several images, its place in the request, from 1."""

    image: int
    box: tuple[float, float, float, float]


class Evidence(BaseModel):
    """What an answer rests on, and what it cost: the field `vitos` of a response.

    Attributes:
        answer: option letter, or text where the question has no options; null: none could be read.
        thought: the thought of the reasoning branch.
        text: everything that the branch wrote, tags included.
        boxes: evidence as x1, y1, x2, y2 in fractions of the first image as it is stored; in another image with its
            place.
        kept_tokens, visual_tokens, kept_ratio: visual tokens that the answer was given from, all visual tokens of the
            images, and the share.
        kept_per_image: kept visual tokens of each image.
        plan: plan that was followed; `fallback_reason` says why it could not be, and what was done instead.
        images: how each image was opened: format, size, frame or slice, window, crop; no value of a header.
        warnings: what a user should check, such as text that may be burned in.
        seconds, tokens: by stage. A stage that runs together with other requests counts its whole time for each.
    """

    answer: str | None
    thought: str | None
    text: str
    boxes: list[tuple[float, float, float, float] | FoundInImage]
    kept_tokens: int
    kept_per_image: list[int]
    visual_tokens: int
    kept_ratio: float
    plan: str
    fallback: bool
    fallback_reason: str
    images: list[str]
    warnings: list[str]
    seconds: dict[str, float]
    tokens: dict[str, int]


class ChatAnswer(BaseModel):
    """`content` is the option with its letter, or the answer's text; empty where no answer could be read."""

    role: Literal["assistant"] = "assistant"
    content: str
    reasoning_content: str | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    """The one answer."""

    index: Literal[0] = 0
    message: ChatAnswer
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Usage(BaseModel):
    """Number of tokens that were read and written in both branches, visual tokens included.

    What was kept from an earlier request about the same images counts as well; `vitos.tokens` has what was run.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatResponse(BaseModel):
    """A finished answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    vitos: Evidence


class ErrorDetail(BaseModel):
    """What was wrong: `message` in a sentence, `code` in one word, `param` the field."""

    message: str
    type: str
    param: str | None = None
    code: str


class ErrorResponse(BaseModel):
    """Body of every error."""

    error: ErrorDetail


class ModelCard(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vitos"


class ModelList(BaseModel):
    """Body of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Body of `GET /health`: "ok", or "stopping" while the last questions are answered."""

    status: Literal["ok", "stopping"]
    running: int
    waiting: int
