"""One question to an OpenAI-compatible server: a request, a bounded reply, and what to do when there is none.

What a failure means decides what follows. A time-out, a lost connection, status 429 and 5xx are tried again after a
pause; an unreadable reply is tried once more; a refused question is given up; and an address, name or key that is
wrong for every question stops the run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from vitos.config.judge import JudgeSection
from vitos.engines.judge.cache import JudgeError

MOST_BYTES = 1 << 20
"""Largest size of a reply; what is longer is given up."""
_AGAIN = (408, 409, 425, 429)
_WRONG_FOR_ALL = {
    401: "the key is missing or wrong; set {variable} in the environment",
    403: "the key may not use it; check {variable} in the environment",
    404: "there is no such address or model; check the URL (it usually ends in /v1) and the model's name",
}


@dataclass(slots=True)
class JudgeCounts:
    """What a judge did in this process.

    Attributes:
        claims: number of answers that a grade was wanted for.
        known: number of them whose grade was known.
        requests: number of requests that were sent, further attempts included.
        tokens: number of tokens that the server counted.
        unavailable: reason → number of answers without a grade.
    """

    claims: int = 0
    known: int = 0
    requests: int = 0
    tokens: int = 0
    unavailable: Counter[str] = field(default_factory=Counter)


class _Unanswered(Exception):
    """No reply to one request.

    Attributes:
        attempts: number of attempts after which it is given up; None: as many as the settings allow.
        pause: seconds that the server asked to wait.
    """

    def __init__(self, reason: str, attempts: int | None = None, pause: float | None = None) -> None:
        super().__init__(reason)
        self.attempts, self.pause = attempts, pause


class JudgeClient:
    """Sends the requests of one batch, within one event loop; use it as a context manager.

    Args:
        section: address, limits and retries.
        counts: where requests, tokens and failures are counted.
        transport: another transport than the network, for tests.
    """

    def __init__(
        self, section: JudgeSection, counts: JudgeCounts, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        self.section, self.counts = section, counts
        self._places = asyncio.Semaphore(section.parallel)
        self._http = httpx2.AsyncClient(
            headers=_headers(section),
            timeout=section.seconds,
            limits=httpx2.Limits(max_connections=section.parallel),
            transport=transport,
        )

    async def __aenter__(self) -> JudgeClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def reply(self, model: str, prompt: str, grade: Any) -> float | None:
        """The grade in the reply to a prompt; None if there is none, which is counted with the reason.

        Args:
            grade: reads a grade from a reply's text; None where it holds none.

        Raises:
            JudgeError: if no question can be answered: a wrong address, model or key.
        """
        async with self._places:
            for attempt in range(1, self.section.retries + 2):
                if reason := self._over_limit():
                    self.counts.unavailable[reason] += 1
                    return None
                try:
                    self.counts.requests += 1
                    async with asyncio.timeout(self.section.seconds):
                        text = await self._text(model, prompt)
                    value: float | None = grade(text)
                    if value is not None:
                        return value
                    failure = _Unanswered("the reply holds no grade", attempts=2)
                except TimeoutError:
                    failure = _Unanswered("time-out")
                except _Unanswered as error:
                    failure = error
                if attempt >= min(failure.attempts or attempt + 1, self.section.retries + 1):
                    break
                await asyncio.sleep(self._pause(attempt, failure.pause))
        self.counts.unavailable[str(failure)] += 1
        return None

    def _over_limit(self) -> str:
        section, counts = self.section, self.counts
        if section.max_requests is not None and counts.requests >= section.max_requests:
            return "max_requests is reached"
        if section.max_total_tokens is not None and counts.tokens >= section.max_total_tokens:
            return "max_total_tokens is reached"
        return ""

    def _pause(self, attempt: int, asked: float | None) -> float:
        longest = self.section.longest_pause
        if asked is not None:
            return min(asked, longest)
        return min(self.section.pause * 2.0 ** (attempt - 1), longest) * random.uniform(0.5, 1)

    async def _text(self, model: str, prompt: str) -> str:
        """The text of a reply, read up to `MOST_BYTES`."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.section.reply_tokens,
            **self.section.options,
        }
        data = bytearray()
        try:
            async with self._http.stream(
                "POST", f"{self.section.url.rstrip('/')}/chat/completions", json=body
            ) as reply:
                self._check_status(reply)
                async for piece in reply.aiter_bytes():
                    data += piece
                    if len(data) > MOST_BYTES:
                        raise _Unanswered("the reply is too long", attempts=1)
        except httpx2.TimeoutException as error:
            raise _Unanswered("time-out") from error
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise _Unanswered("the connection was lost") from error
        return self._content(bytes(data))

    def _check_status(self, reply: httpx2.Response) -> None:
        status, section = reply.status_code, self.section
        if status == 200:
            return
        if status in _AGAIN or status >= 500:
            raise _Unanswered(f"status {status}", pause=_retry_after(reply.headers.get("retry-after")))
        if why := _WRONG_FOR_ALL.get(status):
            raise JudgeError(
                f"{section.url} answers with status {status}: " + why.format(variable=section.key_variable)
            )
        if 300 <= status < 400:
            raise JudgeError(f"{section.url} redirects (status {status}); give the address that it leads to")
        raise _Unanswered(f"status {status}", attempts=1)

    def _content(self, data: bytes) -> str:
        try:
            body = json.loads(data)
            usage = body.get("usage") or {}
            self.counts.tokens += int(usage.get("total_tokens") or 0)
            text = body["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise _Unanswered("the reply is no chat completion", attempts=2) from error
        if not isinstance(text, str):
            raise _Unanswered("the reply is no chat completion", attempts=2)
        return text


def only_model(section: JudgeSection) -> str:
    """The name of the only model that the server lists.

    Raises:
        JudgeError: if it lists none or several, or does not answer.
    """
    try:
        reply = httpx2.get(f"{section.url.rstrip('/')}/models", headers=_headers(section), timeout=section.seconds)
        reply.raise_for_status()
        names = [str(row["id"]) for row in reply.json()["data"]]
    except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
        raise JudgeError(f"{section.url} does not say which model it has ({error}); name the judge's model") from error
    if len(names) != 1:
        raise JudgeError(f"{section.url} has {len(names)} models ({', '.join(names[:5])}); name the judge's model")
    return names[0]


def _headers(section: JudgeSection) -> dict[str, str]:
    key = os.environ.get(section.key_variable)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait: the header holds them, or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value)) if value.strip()[:1].isdigit() else max(0.0, _date(value) - time.time())
    except (ValueError, TypeError):
        return None


def _date(value: str) -> float:
    return parsedate_to_datetime(value).timestamp()
