"""`vitos serve`: a model behind OpenAI's chat completions, on FastAPI (extra `serve`).

One process, one model, one scheduler. A request shows its token, then takes a place in a bounded queue before its body
is read, so that memory is bounded by the number of places times the largest body and pictures. Images are opened in
other processes. Nothing of an image, a name or a question
is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from anyio import to_process, to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from vitos.policy.plans import Limits, get_plan
from vitos.policy.run import Piece
from vitos.policy.types import Finding
from vitos.policy.vlm import SparseVLM
from vitos.serve.api import schema
from vitos.serve.api.answer import Thought, chunk, completion
from vitos.serve.api.body import ApiError, find_images, read_chat
from vitos.serve.api.images import BadImage, ImageFile, RequestImage, Source, open_all
from vitos.serve.api.metrics import Metrics
from vitos.serve.api.scheduler import Event, Failure, Job, Scheduler

_log = logging.getLogger(__name__)
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_READING = 30.0  # seconds that a client may take to read a stream beyond those until its answer
_FAILED = {"invalid": 400, "timeout": 504, "cancelled": 499, "internal": 500}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How a model is served.

    Attributes:
        name: name of the model in the API.
        token: bearer token of all but /health; None: anyone may ask.
        images: folder whose files a request may name as `file:NAME`; None: no file may be named.
        max_running: largest number of questions decoded together.
        max_waiting: largest number of questions that wait; a request beyond it gets 429.
        max_tokens: longest response of a branch, and the default of a request.
        max_bytes, max_pixels: largest size of a request's body, and largest number of pixels of all its images.
        seconds: time within which a question must be answered, counted from the end of its body.
        head_seconds, body_seconds: time within which a request's headers and its body must arrive.
        open_seconds: time within which the images of a request must be opened.
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
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    open_seconds: float = 10.0
    scan_bytes: int = 1 << 30


class Server:
    """The state that the routes share."""

    def __init__(self, policy: SparseVLM, settings: ServerSettings) -> None:
        self.settings = settings
        self.policy = policy
        self.scheduler = Scheduler(policy, settings.max_running, settings.scan_bytes)
        self.metrics = Metrics(lambda: self.scheduler.running, lambda: self.scheduler.waiting)
        self.started = int(time.time())
        self._source = Source(settings.images)
        self._places = settings.max_running + settings.max_waiting
        # Decoded pictures are large, so few at once; a volume takes seconds, and pictures do not wait for it.
        self._opening_volumes, self._opening_pictures = anyio.CapacityLimiter(1), anyio.CapacityLimiter(2)

    @property
    def places(self) -> int:
        """Number of questions that would be taken now."""
        return self._places

    def check_token(self, request: Request) -> None:
        """Refuse without the bearer token, if there is one."""
        if self.settings.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), self.settings.token.encode())
        if scheme.lower() != "bearer" or not right:
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
                patience = self.settings.seconds + _READING
                return EventStream(self._streamed(chat, job, events), partial(self._left, job), patience)
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
        deadline = time.monotonic() + settings.seconds
        if chat.model != settings.name:
            raise ApiError(404, "model_not_found", f"this server has the model {settings.name!r}", "model")
        if (chat.limit or 1) > settings.max_tokens:
            raise ApiError(
                400, "invalid_request", f"an answer may have at most {settings.max_tokens} tokens", "max_tokens"
            )
        plan = chat.vitos.plan or self.policy.spec.plan
        if refusal := get_plan(plan).refusal(self.policy.backbone):
            raise ApiError(400, "invalid_request", refusal, "vitos.plan")
        text, files = await to_thread.run_sync(partial(find_images, chat, attachments, self._source))
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
        images = await self._open(files, deadline)
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
            deadline=deadline,
            boxes=chat.vitos.evidence,
            budget=chat.vitos.budget,
        )
        try:
            self.scheduler.submit(job)
        except RuntimeError:
            raise ApiError(503, "stopping", "the server is stopping; send the request to another one") from None
        return job, events

    async def _open(self, files: Sequence[ImageFile], deadline: float) -> list[RequestImage]:
        """The images of a request, opened in another process, which is ended if it takes too long."""
        settings = self.settings
        late = ApiError(504, "timeout", "opening the images took too long; send smaller ones, and slices, not volumes")
        turn = self._opening_volumes if any(file.volume for file in files) else self._opening_pictures
        try:
            with anyio.fail_after(max(0.0, deadline - time.monotonic())):
                async with turn:
                    with (
                        tempfile.TemporaryDirectory(prefix="vitos-") as folder,
                        anyio.fail_after(settings.open_seconds),
                    ):
                        given = (files, Path(folder), settings.max_pixels)
                        return await to_process.run_sync(open_all, *given, cancellable=True)
        except TimeoutError:
            raise late from None
        except BadImage as error:
            raise ApiError(400, "invalid_image", str(error), "messages") from None
        except anyio.BrokenWorkerProcess:  # the system ended it, as it does for lack of memory
            raise ApiError(500, "internal", "the images could not be opened; send smaller ones") from None

    def _left(self, job: Job) -> None:
        """A stream has ended, however far it came."""
        job.cancelled = True
        self._places += 1

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
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events: the thought while it is written, then the answer with its evidence."""
        header, thought = self._header(), Thought()
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

    def _header(self) -> dict[str, Any]:
        created = int(time.time())
        return {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": created, "model": self.settings.name}


class EventStream(StreamingResponse):
    """Server-sent events. A generator that never began runs no `finally`, so the response itself says when it ends.

    Args:
        left: called once, when the response has been sent or the client is gone.
        seconds: time after which a client that does not read is left.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], left: Callable[[], None], seconds: float) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events = events
        self._left = left
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.move_on_after(self._seconds):
                await super().__call__(scope, receive, send)
        finally:
            self._left()
            await self._events.aclose()


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
    # No pages of documentation: FastAPI's load scripts from a public network.
    told = "Answers from sparse visual tokens. Research use only."
    app = FastAPI(title="vitos", summary=told, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
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

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> dict[str, Any]:
        server.check_token(request)
        return app.openapi()

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
