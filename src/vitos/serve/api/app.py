"""`vitos serve`: a model behind OpenAI's chat completions, on FastAPI (extra `serve`).

One process, one model, one scheduler. A request takes a place in a bounded queue before its body is read, so that
memory is bounded by the number of places times the largest body and picture. Nothing of an image, a name or a question
is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from vitos.policy.plans import Limits, get_plan
from vitos.policy.run import Piece
from vitos.policy.types import Finding
from vitos.policy.vlm import SparseVLM
from vitos.serve.api import schema
from vitos.serve.api.answer import Thought, chunk, completion
from vitos.serve.api.body import ApiError, open_images, read_chat
from vitos.serve.api.images import Source
from vitos.serve.api.metrics import Metrics
from vitos.serve.api.scheduler import Event, Failure, Job, Scheduler

_log = logging.getLogger(__name__)
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_FAILED = {"invalid": 400, "timeout": 504, "cancelled": 499, "internal": 500}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How a model is served.

    Attributes:
        name: name of the model in the API.
        token: bearer token of /v1 and /metrics; None: anyone may ask.
        images: folder whose files a request may name as `file:NAME`; None: no file may be named.
        max_running: largest number of questions decoded together.
        max_waiting: largest number of questions that wait; a request beyond it gets 429.
        max_tokens: longest response of a branch, and the default of a request.
        max_bytes, max_pixels: largest size of a request's body, and largest number of pixels of an image.
        seconds, body_seconds: time within which a question must be answered, and a body must arrive.
        scan_bytes: largest size of the encoded images kept for further questions.
    """

    name: str = "nano"
    token: str | None = None
    images: Path | None = None
    max_running: int = 16
    max_waiting: int = 64
    max_tokens: int = 256
    max_bytes: int = 32 << 20
    max_pixels: int = 16_000_000
    seconds: float = 120.0
    body_seconds: float = 30.0
    scan_bytes: int = 1 << 30


class Server:
    """The state that the routes share."""

    def __init__(self, policy: SparseVLM, settings: ServerSettings) -> None:
        self.settings = settings
        self.policy = policy
        self.scheduler = Scheduler(policy, settings.max_running, settings.scan_bytes)
        self.metrics = Metrics(lambda: self.scheduler.running, lambda: self.scheduler.waiting)
        self.started = int(time.time())
        self._source = Source(settings.images, settings.max_pixels)
        self._places = settings.max_running + settings.max_waiting
        self._opening = asyncio.Semaphore(2)  # decoded pictures are large

    def check_token(self, request: Request) -> None:
        """Refuse without the bearer token, if there is one."""
        if self.settings.token is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.settings.token.encode()):
            raise ApiError(401, "invalid_api_key", "wrong or missing bearer token")

    async def chat(self, request: Request) -> Response:
        """Answer one question, whole or streamed."""
        if not self.scheduler.alive:
            raise ApiError(503, "stopping", "the server is stopping; send the request to another one")
        if self._places == 0:
            raise ApiError(429, "queue_full", "too many questions are waiting; try again later")
        self._places -= 1
        streaming = False
        try:
            chat, attachments = await read_chat(request, self.settings.max_bytes, self.settings.body_seconds)
            job, events = await self._submit(chat, attachments)
            if chat.stream:
                streaming = True
                return StreamingResponse(self._streamed(chat, job, events), media_type="text/event-stream")
            finding = await self._finding(request, job, events)
            self.metrics.answered(finding)
            return JSONResponse(completion(self._header(), job, finding).model_dump())
        except ApiError as error:
            self.metrics.requests.labels(error.code).inc()
            raise
        finally:
            self._places += not streaming

    async def _submit(
        self, chat: schema.ChatRequest, attachments: dict[str, bytes]
    ) -> tuple[Job, asyncio.Queue[Event]]:
        """Hand a request's question to the scheduler."""
        settings, loop = self.settings, asyncio.get_running_loop()
        if chat.model != settings.name:
            raise ApiError(404, "model_not_found", f"this server has the model {settings.name!r}", "model")
        if (chat.limit or 1) > settings.max_tokens:
            raise ApiError(
                400, "invalid_request", f"an answer may have at most {settings.max_tokens} tokens", "max_tokens"
            )
        plan = chat.vitos.plan or self.policy.spec.plan
        if refusal := get_plan(plan).refusal(self.policy.backbone):
            raise ApiError(400, "invalid_request", refusal, "vitos.plan")
        async with self._opening:
            text, images = await to_thread.run_sync(partial(open_images, chat, attachments, self._source))
        limits = Limits(
            max_tokens=chat.limit or settings.max_tokens,
            max_evidence_tokens=min(chat.vitos.max_evidence_tokens or settings.max_tokens, settings.max_tokens),
            evidence_only=chat.vitos.evidence_only,
            stop=chat.stops,
        )
        longest = max(limits.max_tokens, limits.max_evidence_tokens)
        too_long = partial(self.policy.branches.length_problem, text, "letter", longest)
        if problem := await to_thread.run_sync(too_long):  # before it joins the queue
            raise ApiError(400, "context_length_exceeded", problem, "messages")
        events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the client is gone
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(
            images=images,
            text=text,
            plan=plan,
            limits=limits,
            emit=emit,
            deadline=time.monotonic() + settings.seconds,
            boxes=chat.vitos.evidence,
            budget=chat.vitos.budget,
        )
        try:
            self.scheduler.submit(job)
        except RuntimeError:
            raise ApiError(503, "stopping", "the server is stopping; send the request to another one") from None
        return job, events

    async def _finding(self, request: Request, job: Job, events: asyncio.Queue[Event]) -> Finding:
        """The whole answer; the question of a client that goes away is given up."""
        gone = asyncio.create_task(_gone(request))
        try:
            while True:
                waiting = asyncio.create_task(events.get())
                await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not waiting.done():
                    waiting.cancel()
                    raise ApiError(499, "cancelled", "the client went away")
                event = waiting.result()
                if isinstance(event, Failure):
                    raise _refusal(event)
                if isinstance(event, Finding):
                    return event
        finally:
            job.cancelled = True
            gone.cancel()

    async def _streamed(
        self, chat: schema.ChatRequest, job: Job, events: asyncio.Queue[Event]
    ) -> AsyncIterator[bytes]:
        """Server-sent events: the thought while it is written, then the answer with its evidence."""
        header, thought = self._header(), Thought()
        try:
            yield chunk(header, {"role": "assistant", "content": ""})
            while True:
                event = await events.get()
                if isinstance(event, Piece):
                    delta = {"reasoning_content": new} if (new := thought.next(event)) else {}
                    yield chunk(header, delta, vitos={"branch": event.branch, "text": event.text})
                elif isinstance(event, Failure):
                    error = _refusal(event)
                    self.metrics.requests.labels(error.code).inc()
                    yield f"data: {_error_body(error).model_dump_json()}\n\n".encode()
                    return
                else:
                    self.metrics.answered(event)
                    whole = completion(header, job, event)
                    (choice,) = whole.choices
                    yield chunk(header, {"content": choice.message.content})
                    yield chunk(header, {}, choice.finish_reason, vitos=whole.vitos.model_dump())
                    if chat.stream_options and chat.stream_options.include_usage:
                        yield chunk(header, None, usage=whole.usage.model_dump())
                    yield b"data: [DONE]\n\n"
                    return
        finally:
            job.cancelled = True
            self._places += 1

    def _header(self) -> dict[str, Any]:
        created = int(time.time())
        return {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": created, "model": self.settings.name}


def build_app(policy: SparseVLM, settings: ServerSettings | None = None) -> FastAPI:
    """The application. Its scheduler starts at once, and ends with the application's lifespan when all is answered."""
    server = Server(policy, settings or ServerSettings())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await to_thread.run_sync(server.scheduler.close)

    statuses = (400, 401, 404, 405, 408, 413, 415, 429, 500, 503, 504)
    errors: dict[int | str, dict[str, Any]] = {status: {"model": schema.ErrorResponse} for status in statuses}
    app = FastAPI(title="vitos", summary="Answers from sparse visual tokens. Research use only.", lifespan=lifespan)
    app.state.server = server

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
        return JSONResponse(_error_body(error).model_dump(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> JSONResponse:
        refusal = ApiError(error.status_code, "not_found", str(error.detail))
        return JSONResponse(_error_body(refusal).model_dump(), error.status_code, error.headers)

    @app.post(
        "/v1/chat/completions",
        response_model=schema.ChatResponse,
        responses=errors,
        openapi_extra={"requestBody": {"required": True, "content": _bodies(server.settings.name)}},
    )
    async def chat(request: Request) -> Response:
        server.check_token(request)
        return await server.chat(request)

    @app.get("/v1/models", responses={401: errors[401]})
    async def models(request: Request) -> schema.ModelList:
        server.check_token(request)
        return schema.ModelList(data=[schema.ModelCard(id=server.settings.name, created=server.started)])

    @app.get("/health", responses={503: {"model": schema.Health}})
    async def health(response: Response) -> schema.Health:
        alive = server.scheduler.alive
        response.status_code = 200 if alive else 503
        status = "ok" if alive else "stopping"
        return schema.Health(status=status, running=server.scheduler.running, waiting=server.scheduler.waiting)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, 401: errors[401]})
    async def metrics(request: Request) -> Response:
        server.check_token(request)
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _bodies(name: str) -> dict[str, Any]:
    """JSON schema of a chat request, its definitions inlined: FastAPI does not read the body and so has no schema."""
    wanted = json.loads(json.dumps(schema.ChatRequest.model_json_schema(ref_template="#/definitions/{model}")))
    definitions = wanted.pop("$defs")
    wanted["properties"]["model"]["const"] = name

    def resolved(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolved(definitions[node["$ref"].rpartition("/")[2]])
            return {key: resolved(value) for key, value in node.items() if key != "discriminator"}
        return [resolved(value) for value in node] if isinstance(node, list) else node

    parts = {"type": "object", "properties": {"request": {"type": "string"}}, "required": ["request"]}
    return {"application/json": {"schema": resolved(wanted)}, "multipart/form-data": {"schema": parts}}


def _error_body(error: ApiError) -> schema.ErrorResponse:
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    detail = schema.ErrorDetail(message=error.message, type=kind, param=error.param, code=error.code)
    return schema.ErrorResponse(error=detail)


def _refusal(failure: Failure) -> ApiError:
    return ApiError(_FAILED[failure.kind], failure.kind, failure.message)


async def _gone(request: Request) -> None:
    """Return when the client has gone away."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)
