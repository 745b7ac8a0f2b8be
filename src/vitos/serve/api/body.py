"""The body of a request, read within limits: JSON, or multipart with that JSON as the part `request` and files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from vitos.core.record import IMAGE_PLACEHOLDER, parse_options
from vitos.serve.api.images import BadImage, ImageFile, Source
from vitos.serve.api.schema import NOT_SERVED, ChatRequest, TextPart

MAX_IMAGES = 16
"""Largest number of images of a request."""

_SPEAKER = {"user": "Earlier question: ", "assistant": "Earlier answer: "}


class ApiError(Exception):
    """A refusal: HTTP status, OpenAI's code, a message that says what to do, and the field that it is about."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param


async def read_chat(request: Request, max_bytes: int, seconds: float) -> tuple[ChatRequest, dict[str, bytes]]:
    """The chat request, and the content of each attachment by its name.

    Args:
        max_bytes: largest size of the body.
        seconds: time within which the body must arrive.

    Raises:
        ApiError: 400 for a body that is no chat request; 408, 413 or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise ApiError(415, "unsupported_media_type", "send application/json or multipart/form-data")
    if (
        kind == "multipart/form-data" and "origin" in request.headers
    ):  # a browser sends it for any page, without asking
        raise ApiError(415, "unsupported_media_type", "a page in a browser must send application/json")
    try:
        async with asyncio.timeout(seconds):
            body = await _read(request, max_bytes)
    except TimeoutError:
        raise ApiError(408, "body_timeout", f"the request did not arrive within {seconds:g} s") from None
    attachments: dict[str, bytes] = {}
    if kind == "multipart/form-data":
        body, attachments = await _split(request, body)
    try:
        text = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "invalid_json", "the request is not JSON") from None
    if (field := _half_character(text)) is not None:
        wrong = f"{field or 'request'}: holds half a character; correct the text"
        raise ApiError(400, "invalid_request", wrong, field or None)
    try:
        return ChatRequest.model_validate(text), attachments
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        wrong = NOT_SERVED if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise ApiError(400, "invalid_request", f"{param or 'request'}: {wrong}", param) from None


def find_images(chat: ChatRequest, attachments: dict[str, bytes], source: Source) -> tuple[str, list[ImageFile]]:
    """The question, with `<image>` at the place of each image, and the files of these images, not opened yet.

    What was said before (system messages, earlier turns) is put as text before the question.

    Raises:
        ApiError: 400 for an image that cannot be found, for too many images, for a conversation without an image or a
            question, and for options before the question, which could not be told from its own.
    """
    files: list[ImageFile] = []
    before, question = "", ""
    for i, message in enumerate(chat.messages):
        text = ""
        for j, part in enumerate(message.content):
            field = f"messages.{i}.content.{j}"
            if isinstance(part, TextPart):
                if IMAGE_PLACEHOLDER in part.text:
                    wrong = f"a text may not hold {IMAGE_PLACEHOLDER}; send the image as a part of type image_url"
                    raise ApiError(400, "invalid_request", wrong, field)
                text += "\n" * bool(text and not text.endswith(IMAGE_PLACEHOLDER)) + part.text
                continue
            if len(files) == MAX_IMAGES:
                raise ApiError(400, "too_many_images", f"a request may have {MAX_IMAGES} images; send fewer", field)
            try:
                files.append(source.find(part.image_url.url, part.image_url.select, attachments))
            except BadImage as error:
                raise ApiError(400, "invalid_image", f"image {len(files) + 1}: {error}", field) from None
            text += IMAGE_PLACEHOLDER
        if i == len(chat.messages) - 1:
            question = text
        elif text.strip():
            before += f"{_SPEAKER.get(message.role, '')}{text}\n\n"
    if not files:
        raise ApiError(400, "no_image", "the message has no image; add a part of type image_url", "messages")
    if not question.replace(IMAGE_PLACEHOLDER, "").strip():
        raise ApiError(400, "no_question", "the message has no question; add a part of type text", "messages")
    if parse_options(before + question) != parse_options(question):
        wrong = "options (A., B. …) before the last message would be taken for its own; leave them out there"
        raise ApiError(400, "invalid_request", wrong, "messages")
    return before + question, files


def _half_character(body: Any) -> str | None:
    """The first field of JSON whose text, or one of whose names, holds a lone surrogate; None: there is none.

    Such text is valid JSON, but no tokenizer takes it and no response can repeat it.
    """
    todo: list[tuple[str, Any]] = [("", body)]
    while todo:
        field, node = todo.pop()
        if isinstance(node, str) and not _is_whole(node):
            return field
        inside = field and f"{field}."
        if isinstance(node, dict):
            if not all(map(_is_whole, node)):
                return field
            todo += [(f"{inside}{key}", value) for key, value in reversed(node.items())]
        elif isinstance(node, list):
            todo += [(f"{inside}{i}", value) for i, value in reversed(list(enumerate(node)))]
    return None


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(413, "request_too_large", f"a request may have {max_bytes} bytes; send smaller images")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise ApiError(400, "disconnected", "the request ended before its body") from None
    return bytes(body)


async def _split(request: Request, body: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The part `request` and the files of a multipart body."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(
        request.headers, stream(), max_files=MAX_IMAGES, max_fields=1, max_part_size=max(len(body), 1)
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, UnicodeError):
        raise ApiError(400, "invalid_multipart", "the multipart body cannot be read") from None
    attachments: dict[str, bytes] = {}
    chat: Any = form.get("request")
    try:
        for name, part in form.multi_items():
            if isinstance(part, UploadFile) and name != "request":
                attachments[part.filename or name] = await part.read()
        if isinstance(chat, UploadFile):
            chat = await chat.read()
    finally:
        await form.close()
    if chat is None:
        raise ApiError(400, "invalid_multipart", "the JSON of the request is missing: a part named request", "request")
    return chat if isinstance(chat, bytes) else str(chat).encode(), attachments
