"""The body of a request, read within limits: JSON, or multipart with that JSON as the part `request`, and files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from vitos.core.record import IMAGE_PLACEHOLDER
from vitos.serve.api.images import BadImage, Opened, Source
from vitos.serve.api.schema import ChatRequest, TextPart

MAX_ATTACHMENTS = 16


class ApiError(Exception):
    """A refusal: HTTP status, OpenAI's type and code of it, a message that says what to do, and the field."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param


async def read_chat(request: Request, max_bytes: int, seconds: float) -> tuple[ChatRequest, dict[str, bytes]]:
    """The chat request and its attachments by name.

    Raises:
        ApiError: 400 for what is no chat request, 408, 413 or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise ApiError(415, "unsupported_media_type", "send application/json or multipart/form-data")
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
    try:
        return ChatRequest.model_validate(text), attachments
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        raise ApiError(400, "invalid_request", f"{param or 'request'}: {first['msg']}", param) from None


def open_images(chat: ChatRequest, attachments: dict[str, bytes], source: Source) -> tuple[str, list[Opened]]:
    """The question with `<image>` in the places of its images, and these.

    Raises:
        ApiError: 400.
    """
    text = ""
    opened: list[Opened] = []
    for part in chat.messages[0].content:
        if isinstance(part, TextPart):
            if IMAGE_PLACEHOLDER in part.text:
                raise ApiError(
                    400, "invalid_request", f"{IMAGE_PLACEHOLDER} in a text stands for no image", "messages"
                )
            text += "\n" * bool(text and not text.endswith(IMAGE_PLACEHOLDER)) + part.text
            continue
        try:
            address = part.image_url
            opened.append(source.open(address.url, address.select, attachments, len(opened) + 1))
        except BadImage as error:
            raise ApiError(400, "invalid_image", str(error), "messages") from None
        text += IMAGE_PLACEHOLDER
    if not opened:
        raise ApiError(400, "no_image", "the message has no image; add a part of type image_url", "messages")
    if not text.replace(IMAGE_PLACEHOLDER, "").strip():
        raise ApiError(400, "no_question", "the message has no question; add a part of type text", "messages")
    return text, opened


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
        request.headers, stream(), max_files=MAX_ATTACHMENTS, max_fields=1, max_part_size=max(len(body), 1)
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
