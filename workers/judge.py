"""Asking a model behind an OpenAI-compatible endpoint for scores: patiently, within bounds, and nothing twice.

Every verdict is kept under the hash of what was asked, as soon as it is there: a job that goes on finds it, and so
does any other that asks the same. The key travels in a header to that one address; redirects are not followed.
"""

import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from pydantic import SecretStr

from service import artifacts, codec
from service.contracts import JobContext
from service.errors import Invalid, Unavailable
from service.judging import UNREADABLE, HttpJudge, Verdict
from service.storage import Storage
from service.work import FORMAT
from workers.scores import read_score

_STAGE = "judging answers"
_POLL_S = 0.5
OK = 200
_MOST_BYTES = 1 << 20  # of a reply
_SHOWN = 300
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_OF_ONE = {400, 413, 422}  # may be about this question alone: a content filter, a text that is too long
_MOST_REFUSED = 3  # such questions, before a judge that has answered none is given up

# What is asked for beside the question; a server that refuses one is asked with the next from then on.
_FORMS: tuple[dict[str, Any], ...] = (
    {"temperature": 0, "seed": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 20},
    {"temperature": 0, "seed": 0, "max_tokens": 8},
    {"temperature": 0, "max_tokens": 8},
    {},
)


@dataclass(frozen=True)
class Patience:
    """``wait_s``: before the second attempt, doubled for every further one, ``most_wait_s`` at most, which also
    bounds what a server may ask for in Retry-After. ``limits``: how often it may do that for one question.
    """

    attempts: int = 8
    limits: int = 100
    timeout_s: float = 60.0
    wait_s: float = 1.0
    most_wait_s: float = 60.0


class _Stopped(Exception):
    """Somebody else failed, or the job must stop."""


class Asker:
    """One judge, for one job."""

    def __init__(
        self,
        judge: HttpJudge,
        storage: Storage,
        *,
        key: SecretStr | None,
        parallel: int,
        patience: Patience = Patience(),
    ) -> None:
        self._judge, self._storage, self._key = judge, storage, key
        self._parallel, self._patience = parallel, patience
        self._form = 0
        self._stop = threading.Event()
        self._not_before = 0.0  # of time.monotonic: a rate limit is everybody's

    def ask(self, questions: Sequence[str], context: JobContext) -> list[Verdict]:
        """A verdict for every question. Raises what ``context.check`` raises, Invalid for what a judge will never
        accept, and Unavailable when it did not answer in time; verdicts so far are kept. A question that it refuses
        while it answers others has no score.
        """
        keys = [codec.digest([FORMAT, "verdict", self._judge.url, self._judge.model, each]) for each in questions]
        pool = ThreadPoolExecutor(self._parallel, "judge")
        unique = list(dict.fromkeys(keys))
        stored = pool.map(lambda key: artifacts.made(self._storage, key), unique)
        found = {key: _from_facts(made.facts) for key, made in zip(unique, stored, strict=True) if made is not None}
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in found}
        total, known_before = len(unique), len(found)
        context.progress(_STAGE, known_before, total, unit="answers", resumed=known_before)
        running: dict[Future[Verdict], str] = {}
        refused: dict[str, Invalid] = {}
        with self._connected() as client:
            try:
                while missing or running:
                    while missing and len(running) < self._parallel:
                        key, question = missing.popitem()
                        running[pool.submit(self._one, client, key, question)] = key
                    done, _ = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                    for future in done:
                        key = running.pop(future)
                        try:
                            found[key] = future.result()
                        except Invalid as error:
                            refused[key] = error
                            of_all = not found and len(refused) >= min(_MOST_REFUSED, total)
                            if of_all or error.context.get("status") not in _OF_ONE:
                                raise
                    told = len(found) + len(refused)
                    context.progress(_STAGE, told, total, unit="answers", resumed=known_before)
                    context.check()
            finally:
                self._stop.set()  # who sleeps need not go on; who has an answer on the way keeps it
                pool.shutdown(wait=False, cancel_futures=True)
        for key, error in refused.items():  # kept only now that the judge is known to answer
            found[key] = self._kept(key, Verdict(None, UNREADABLE, error.context["reply"]))
        return [found[key] for key in keys]

    def _one(self, client: httpx.Client, key: str, question: str) -> Verdict:
        return self._kept(key, self._verdict(client, question))

    def _kept(self, key: str, verdict: Verdict) -> Verdict:
        artifacts.publish(self._storage, key, {}, facts=_to_facts(verdict), answer=True)
        return verdict

    def _verdict(self, client: httpx.Client, question: str) -> Verdict:
        attempts, limits, form, last = 0, 0, self._form, ""
        while attempts < self._patience.attempts and limits <= self._patience.limits:
            self._pause()
            try:
                status, headers, body = self._post(client, question, form)
            except httpx.HTTPError as error:
                attempts, last = attempts + 1, f"{type(error).__name__}: {error}"
                self._back_off(attempts)
                continue
            if status == OK and (choice := _choice(body)) is not None:
                self._form = max(self._form, form)  # what has been refused for this question and now is answered
                return read_score(choice)
            last = f"{status}: {self._shown(body)}"
            if status in {400, 422} and form + 1 < len(_FORMS):
                form += 1
            elif status != OK and status not in _AGAIN:
                raise self._refused(status, body)
            elif (seconds := _retry_after(headers)) is not None:
                limits += 1
                self._not_before = max(
                    self._not_before, time.monotonic() + min(seconds, self._patience.most_wait_s)
                )
            else:
                attempts += 1
                self._back_off(attempts)
        raise Unavailable(
            "judge_unavailable",
            f"{self._judge.url} gave no score in {attempts + limits} attempts; the last: {last} What it has judged "
            "is kept: send the same request again once it answers.",
            param="judge",
        )

    def _post(self, client: httpx.Client, question: str, form: int) -> tuple[int, httpx.Headers, bytes]:
        messages = [{"role": "user", "content": question}]
        sent = {"model": self._judge.model, "messages": messages, **_FORMS[form]}
        with client.stream("POST", f"{self._judge.url}/chat/completions", json=sent) as response:
            body, end = b"", time.monotonic() + self._patience.timeout_s
            for piece in response.iter_bytes():
                body += piece
                if len(body) > _MOST_BYTES:
                    break
                if time.monotonic() > end:  # each piece came in time, but they do not end
                    raise httpx.ReadTimeout(f"the reply was not complete after {self._patience.timeout_s:g} s")
            return response.status_code, response.headers, body

    def _pause(self) -> None:
        """Wait until the judge may be asked again."""
        while (left := self._not_before - time.monotonic()) > 0:
            self._sleep(left)
        self._sleep(0)

    def _back_off(self, attempts: int) -> None:
        if attempts < self._patience.attempts:
            longest = min(self._patience.wait_s * 2 ** (attempts - 1), self._patience.most_wait_s)
            self._sleep(longest * random.uniform(0.5, 1.0))  # noqa: S311  (so that not all come back at once)

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Stopped

    @contextmanager
    def _connected(self) -> Iterator[httpx.Client]:
        headers = {"Authorization": f"Bearer {self._key.get_secret_value()}"} if self._key else {}
        limits = httpx.Limits(max_connections=self._parallel)
        timeout = httpx.Timeout(self._patience.timeout_s)
        secure = self._judge.url.startswith("https:")  # else there are no certificates to load and look at
        about = {"headers": headers, "limits": limits, "timeout": timeout, "verify": secure}
        with httpx.Client(**about, follow_redirects=False) as client:
            yield client

    def _refused(self, status: int, body: bytes) -> Invalid:
        what = {
            401: "It does not accept the key: see WHENCE_JUDGES.",
            403: "It does not accept the key: see WHENCE_JUDGES.",
            404: "Is the base URL right (it often ends in /v1), and the name of the model?",
        }.get(status, "Is it an OpenAI-compatible endpoint with /chat/completions?")
        detail = f"{self._judge.url} answered {status}: {self._shown(body)} {what}"
        about = {"status": status, "reply": f"{status}: {self._shown(body)}"}
        return Invalid("judge_refuses", detail, param="judge", context=about)

    def _shown(self, body: bytes) -> str:
        """The beginning of a reply, without the key: some servers repeat it."""
        text = body.decode(errors="replace")
        if self._key:  # before it is cut, or half of it might be left
            text = text.replace(self._key.get_secret_value(), "[key]")
        text = " ".join(text[: 4 * _SHOWN].split())
        return f"{text[:_SHOWN] or 'no body'}."


def _choice(body: bytes) -> dict[str, Any] | None:
    """The first choice of a reply; None: this is no chat completion (a proxy's page, or cut off)."""
    try:
        choice = json.loads(body)["choices"][0]
        return choice if isinstance(choice["message"], dict) else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds, given as such or as a date."""
    told = headers.get("Retry-After")
    if told is None:
        return None
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except ValueError:
        return None


def _to_facts(verdict: Verdict) -> dict[str, float | int | str]:
    return {name: value for name, value in vars(verdict).items() if value is not None}


def _from_facts(facts: Any) -> Verdict:
    return Verdict(facts.get("score"), facts.get("reason"), facts.get("said"))
