"""Questions of many clients → one model: a thread that begins, decodes and ends them together.

A plan is a generator of requests to complete (`policy/plans/base.py`). The scheduler holds one for each question that
runs, adds its prompts to the running batch and sends it what was written, so that questions in different stages and of
different plans share each step of decoding. Nothing here knows HTTP.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from vitos.core.geometry import Box
from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import Completion, count_run
from vitos.engines.continuous_batching import RunningBatch
from vitos.policy.plans import Limits, Request, Steps, get_plan
from vitos.policy.run import Piece, finding, start
from vitos.policy.types import Finding, Query, Scan
from vitos.policy.vlm import SparseVLM
from vitos.scans.store import RecentScans, visual_bytes
from vitos.serve.api.images import RequestImage

_log = logging.getLogger(__name__)
_KEYS = count()


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a question got no answer; `kind` is "invalid" (a wrong question), "timeout", "cancelled" or "internal"."""

    kind: str
    message: str


Event = Piece | Finding | Failure
"""What the listener of a question receives: pieces of text, then one finding or failure."""


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """A question that waits or is being answered.

    Attributes:
        text: the question, with `<image>` at the place of each image.
        emit: called with each event, from the scheduler's thread; must not block.
        deadline: `time.monotonic()` at which the question is given up.
        boxes, budget: evidence given with the question, and the share of visual tokens to keep; None: not given.
        cancelled: set by the listener when it goes away.
        steps: the plan at work; None before it begins.
        request: what the plan waits for; None: nothing.
        joined: `time.perf_counter()` at which the request joined the running batch; None: it has not.
        prefix_tokens: number of tokens that the language model had run for an earlier question about the same images.
    """

    images: Sequence[RequestImage]
    text: str
    plan: str
    limits: Limits
    emit: Callable[[Event], None]
    deadline: float
    boxes: tuple[Box, ...] | None = None
    budget: float | None = None
    cancelled: bool = False
    key: int = field(default_factory=lambda: next(_KEYS))
    watch: Stopwatch = field(default_factory=Stopwatch)
    arrived: float = field(default_factory=time.perf_counter)
    query: Query | None = None
    steps: Steps | None = None
    request: Request | None = None
    joined: float | None = None
    prefix_tokens: int = 0

    @property
    def given_up(self) -> bool:
        """The answer is no longer wanted."""
        return self.cancelled or time.monotonic() > self.deadline


class Scheduler:
    """Answers questions by a policy, in one thread.

    Args:
        policy: a policy with the torch engine; from now on only this thread may use it.
        max_running: largest number of questions decoded together.
        scan_bytes: largest size of the encoded images kept for further questions.
    """

    def __init__(self, policy: SparseVLM, max_running: int = 16, scan_bytes: int = 1 << 30) -> None:
        self._policy = policy
        self._max_running = max_running
        self._scans = RecentScans(scan_bytes, _held_bytes)
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._batch = RunningBatch(policy.engine)
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="vitos-scheduler", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether questions are still accepted."""
        return self._thread.is_alive() and not self._closing

    def submit(self, job: Job) -> None:
        """Put a question in line.

        Raises:
            RuntimeError: after `close`.
        """
        with self._wake:
            if not self.alive:
                raise RuntimeError("the scheduler is closed")
            self._waiting.append(job)
            self._wake.notify()

    def close(self, timeout: float | None = None) -> None:
        """Accept no more questions, answer those that wait or run, and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._running or self._closing):
                    self._wake.wait()
                if self._closing and not (self._waiting or self._running):
                    return
                fresh: list[Job] = []
                while self._waiting and len(self._running) + len(fresh) < self._max_running:
                    fresh.append(self._waiting.popleft())
            for job in fresh:
                self._running[job.key] = job
                self._begin(job)
            self._give_up()
            self._join()
            self._step()

    def _begin(self, job: Job) -> None:
        """Encode the images and ask the plan for its first request."""
        job.watch.spend("queue", time.perf_counter() - job.arrived)
        if job.given_up:
            return
        with self._answerable(job):
            job.query = Query.about(self._scan(job), job.text, boxes=job.boxes, budget=job.budget)
            branches, engine = self._policy.branches, self._policy.engine
            job.steps = start(get_plan(job.plan), branches, engine, [job.query], job.limits, job.watch)
            self._advance(job, None)

    def _scan(self, job: Job) -> Scan:
        """The question's images encoded for its plan, unless the same images were encoded shortly before."""
        plan = get_plan(job.plan)
        key = (plan.reduced, plan.shared_layers(self._policy.spec), *(image.digest for image in job.images))
        scan = self._scans.get(key)
        if scan is None:
            scan = self._policy.encode(*(image.picture for image in job.images), plan=job.plan, watch=job.watch)
            scan = scan.of_files([image.facts for image in job.images])
        elif scan.prefix is not None:
            job.prefix_tokens = len(scan.prefix)
        self._scans.keep(key, scan)
        return scan

    def _advance(self, job: Job, completion: Completion | None) -> None:
        """Send a plan what it asked for, and take its next request or its answer."""
        if job.steps is None or job.query is None:
            raise RuntimeError("a question was continued before it began; this is a bug, please report it")
        try:
            job.request = next(job.steps) if completion is None else job.steps.send([completion])
        except StopIteration as end:
            self._end(job, finding(get_plan(job.plan), job.query, end.value[0], job.watch))

    def _join(self) -> None:
        """Add the prompts that wait to the batch, in the order of arrival, as far as there is room."""
        for job in list(self._running.values()):
            if (request := job.request) is None or job.joined is not None:
                continue
            (prompt,), (prefix,) = request.prompts, request.prefixes
            if not self._batch.fits(prompt, request.sampling):
                return
            with self._answerable(job), job.watch.span(f"{request.branch}_prefill"):
                self._batch.join(job.key, prompt, request.sampling, prefix)
                job.joined = time.perf_counter()

    def _step(self) -> None:
        """Write one token in each running row, and continue the plans whose rows have ended."""
        try:
            written = self._batch.step()
        except Exception:  # noqa: BLE001 - lack of memory or a broken weight affects all rows; the thread goes on
            _log.exception("decoding failed for %d questions", len(self._batch))
            self._batch.clear()
            for job in [job for job in self._running.values() if job.joined is not None]:
                self._end(job, Failure("internal", "decoding failed; the server's log says why"))
            return
        for row in written:
            job = self._running[row.key]
            if job.request is None or job.joined is None:
                raise RuntimeError("the batch wrote a row that nothing asked for; this is a bug, please report it")
            if row.text:
                job.emit(Piece(job.request.branch, row.text))
            if row.completion is not None:
                request = job.request
                job.watch.spend(f"{request.branch}_decode", time.perf_counter() - job.joined)
                count_run(job.watch, request.branch, request.prompts, request.prefixes, [[row.completion]])
                job.request = job.joined = None
                with self._answerable(job):
                    self._advance(job, row.completion)

    def _give_up(self) -> None:
        """Drop questions that ran out of time or whose listener went away."""
        for job in [job for job in self._running.values() if job.given_up]:
            kind, message = ("cancelled", "the client went away") if job.cancelled else ("timeout", "it took too long")
            self._end(job, Failure(kind, message))

    def _end(self, job: Job, event: Finding | Failure) -> None:
        """Send a question's listener its last event, and forget the question."""
        if self._running.pop(job.key, None) is None:
            return
        if job.joined is not None:
            self._batch.drop({job.key})
        if job.steps is not None:
            job.steps.close()
        job.emit(event)

    @contextlib.contextmanager
    def _answerable(self, job: Job) -> Iterator[None]:
        """An error inside becomes the failure of this question alone."""
        try:
            yield
        except ValueError as error:  # the package's refusals, which say what to do
            self._end(job, Failure("invalid", str(error)))
        except Exception:  # noqa: BLE001 - an error in one question must not end the thread
            _log.exception("a question failed")
            self._end(job, Failure("internal", "it could not be answered; the server's log says why"))


def _held_bytes(scan: Scan) -> int:
    """Size of a scan's visual tokens, keys and values, and pictures in bytes."""
    pictures = sum(3 * picture.width * picture.height for picture in scan.pictures)
    return pictures + visual_bytes(scan) + (scan.prefix.nbytes if scan.prefix else 0)
