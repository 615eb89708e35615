"""One decode at a time: a thread that owns the session, and the jobs that wait for it in the order they came.

    worker = Worker(session, limit=64)
    job = worker.submit(Job(prompt, request, print))    # post(event) is called on the worker's thread
    worker.cancel(job)
    worker.stop(); worker.close()

A job's events: a `Piece` for every round, then `Done`, or a `RequestError` in place of either. A job that fails, by
what was asked or by a mistake of ours, ends with an error of its own, and the next one begins.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from export.errors import UserError
from runtime.fields import RequestError
from runtime.session import Piece, Request, Session
from runtime.steering import GrammarError

LOG = logging.getLogger("tandem.serve")


class Done(NamedTuple):
    """The answer is whole. reused: tokens of the prompt that the caches held."""

    finish_reason: str
    reused: int


class _CancelledError(Exception):
    pass


Event = Piece | Done | RequestError


class Job:
    """One answer. post: called with each event, from another thread; it may not block or raise."""

    def __init__(self, prompt: Sequence[int], request: Request, post: Callable[[Event], None]) -> None:
        self.prompt, self.request, self._post = prompt, request, post
        self.is_cancelled = self.is_over = False

    def post(self, event: Event) -> None:
        """Nothing is heard after the end."""
        if not self.is_over:
            self.is_over = isinstance(event, Done | RequestError)
            self._post(event)

    def check(self, done: float = 0, total: float = 0) -> None:
        """As the `update` of a prefill: ends it where the answer is not wanted any more."""
        if self.is_cancelled:
            raise _CancelledError


class Worker:
    """limit: jobs that may wait beside the one that runs. reuse: see Session.answer."""

    def __init__(self, session: Session, limit: int, reuse: bool = False) -> None:
        self.session, self.limit, self.reuse = session, limit, reuse
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._change = threading.Condition()
        self.is_stopping = False
        self._thread = threading.Thread(target=self._work, name="decode")
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def check_room(self, coming: int = 0) -> None:
        """Raises RequestError, as `submit` would after `coming` others."""
        with self._change:
            self._check_room(coming)

    def submit(self, job: Job) -> Job:
        """Raises RequestError: there is no place left, or no work is taken any more."""
        with self._change:
            self._check_room()
            self._waiting.append(job)
            self._change.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Of a job that waits, runs or is over. One that runs ends with its round, or a chunk of its prefill."""
        with self._change:
            job.is_cancelled = True
            with contextlib.suppress(ValueError):
                self._waiting.remove(job)

    def stop(self) -> None:
        """Turn away those that wait, and all that come. The one that runs goes on."""
        with self._change:
            self.is_stopping = True
            turned_away = list(self._waiting)
            self._waiting.clear()
            self._change.notify()
        for job in turned_away:
            job.post(_stopping())

    def abort(self) -> None:
        """Cancel the one that runs. Its client hears of it at once, however long the call takes that is under way."""
        with self._change:
            running = self._running
            if running:
                running.is_cancelled = True
        if running:
            running.post(_stopping())

    def close(self) -> None:
        """Stop, abort, and wait for the thread to end."""
        self.stop()
        self.abort()
        self._thread.join()

    def _check_room(self, coming: int = 0) -> None:
        if self.is_stopping:
            raise _stopping()
        if len(self._waiting) + (self._running is not None) + coming > self.limit:
            message = f"the queue is full: {self.limit} requests wait; ask again in a second"
            raise RequestError(429, message, code="queue_full")

    def _next(self) -> Job | None:
        """The job that has waited longest, once there is one; None at the end."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self.is_stopping)
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running

    def _work(self) -> None:
        while job := self._next():
            end = self._end_of(job)
            with self._change:
                self._running = None  # before the client hears of the end: it may ask again at once
            job.post(end)
            del job

    def _end_of(self, job: Job) -> Done | RequestError:
        """Decode, and say how it ended."""
        try:
            return self._decode(job)
        except _CancelledError:
            return _stopping()  # heard only where it was not the client who left
        except BaseException:  # a library's panic is no Exception, and may not end the thread either
            LOG.exception("a request failed")
            return RequestError(500, "the server failed at this request; its log says how")

    def _decode(self, job: Job) -> Done | RequestError:
        job.check()
        pieces: Any  # can be closed
        try:
            pieces = self.session.answer(job.prompt, job.request, job.check, self.reuse)
        except UserError as error:
            return RequestError(400, str(error))
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    job.post(piece)
                    job.check()
        except UserError as error:
            LOG.error("%s", error)
            if isinstance(error, GrammarError):
                return RequestError(400, f"response_format: {error}", "response_format")
            return RequestError(500, str(error))
        return Done(self.session.finish_reason or "stop", self.session.reused)


def _stopping() -> RequestError:
    return RequestError(503, "the server is stopping; ask again later")
