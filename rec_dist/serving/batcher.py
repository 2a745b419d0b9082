"""Requests that wait while a scorer is busy go to it together: nobody waits for others to arrive, and a batch grows with the load.

A bounded queue: a request above the bound is turned away at once, with the seconds after which another try makes sense. A request
that has waited longer than the deadline is given up, and not scored if its turn has not come.
"""

import asyncio
import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from rec_dist.errors import one_line
from rec_dist.serving.engine import Answer, Failure, Outcomes, Query, Refusal
from rec_dist.serving.metrics import Metrics

logger = logging.getLogger(__name__)

MOST_REQUESTS = 64  # of a batch; SASRec gains nothing from more
# Scores of a batch, unless one request alone has more: some 0.1 s of a recommender, some seconds of a language model on two cores.
_MOST_SCORES, _MOST_SLOW_SCORES = 1 << 20, 1 << 9


@dataclass(frozen=True)
class Limits:
    """queue: requests without an answer. deadline_seconds: of a request, from its arrival to its answer."""

    queue: int
    deadline_seconds: float


class Replicas(Protocol):
    """Scorers of one model. count: how many answer at the same time."""

    count: int

    async def answer(self, queries: list[Query]) -> Outcomes:
        """As Engine.answer, by a scorer that is free."""
        ...

    def close(self) -> None:
        """Ends the scorers."""
        ...


class OverloadedError(Exception):
    """The queue is full. seconds: when to try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"try again in {seconds} s")
        self.seconds = seconds


class TooLateError(Exception):
    """The deadline passed."""


class ScoringFailedError(Exception):
    """The scorer failed; the log says how."""


@dataclass
class _Waiting:
    query: Query
    scores: int
    answer: "asyncio.Future[Answer | Refusal]"


class Batcher:
    """The queue before the replicas of one model. slow: whether a score takes milliseconds."""

    def __init__(self, replicas: Replicas, limits: Limits, metrics: Metrics, *, slow: bool) -> None:
        self._replicas, self._limits, self._metrics = replicas, limits, metrics
        self._most_scores = _MOST_SLOW_SCORES if slow else _MOST_SCORES
        self._waiting: deque[_Waiting] = deque()
        self._some, self._idle = asyncio.Event(), 0
        self.unanswered = 0
        self._seconds_each = 0.0  # of a request, as of late
        self._lanes: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to answer. Called in the event loop of the server."""
        self._lanes = [asyncio.create_task(self._lane()) for _ in range(self._replicas.count)]

    async def answer(self, query: Query, scores: int) -> Answer | Refusal:
        """The answer to a question of so many scores. Raises OverloadedError, TooLateError, ScoringFailedError."""
        if self.unanswered >= self._limits.queue:
            raise OverloadedError(max(1, math.ceil(self.unanswered * self._seconds_each)))
        waiting = _Waiting(query, scores, asyncio.get_running_loop().create_future())
        self._count(1)
        self._waiting.append(waiting)
        self._some.set()
        try:
            async with asyncio.timeout(self._limits.deadline_seconds):
                return await waiting.answer
        except TimeoutError:
            raise TooLateError from None
        finally:
            self._count(-1)

    async def close(self) -> None:
        """Waits until every request has its answer, then ends the replicas."""
        while self.unanswered:
            await asyncio.sleep(0.05)
        for lane in self._lanes:
            lane.cancel()
        await asyncio.gather(*self._lanes, return_exceptions=True)
        await asyncio.to_thread(self._replicas.close)

    def _count(self, change: int) -> None:
        self.unanswered += change
        self._metrics.unanswered.inc(change)

    async def _lane(self) -> None:
        """Keeps one replica busy."""
        while True:
            self._idle += 1
            await self._some.wait()
            batch = self._take()
            self._idle -= 1
            if batch:
                await self._serve(batch)

    def _take(self) -> list[_Waiting]:
        """The next requests: an equal share for each idle replica, up to the limits."""
        share = min(MOST_REQUESTS, math.ceil(len(self._waiting) / self._idle))
        batch: list[_Waiting] = []
        scores = 0
        while self._waiting and len(batch) < share:
            first = self._waiting[0]
            if not first.answer.done():  # by the deadline
                if batch and scores + first.scores > self._most_scores:
                    break
                batch.append(first)
                scores += first.scores
            self._waiting.popleft()
        if not self._waiting:
            self._some.clear()
        return batch

    async def _serve(self, batch: list[_Waiting]) -> None:
        began = time.monotonic()
        try:
            outcomes = await self._replicas.answer([one.query for one in batch])
        except Exception as fault:  # of the replicas; what fails a question comes back as its outcome
            logger.warning(f"a batch of {len(batch)} requests failed: {type(fault).__name__}: {one_line(fault, 500)}")
            for one in batch:
                _fail(one)
            return
        seconds = time.monotonic() - began
        for one, outcome in zip(batch, outcomes.each, strict=True):
            if isinstance(outcome, Failure):
                logger.warning(f"the model failed on a request: {outcome.sentence}")
                _fail(one)
            elif not one.answer.done():
                one.answer.set_result(outcome)
        each = seconds / len(batch) / self._replicas.count
        self._seconds_each = each if not self._seconds_each else 0.8 * self._seconds_each + 0.2 * each
        self._metrics.batch_requests.observe(len(batch))
        self._metrics.batch_seconds.observe(seconds)
        self._metrics.scores.inc(sum(one.scores for one in batch))
        self._metrics.count_prompts(outcomes.prompts)


def _fail(request: _Waiting) -> None:
    if not request.answer.done():
        request.answer.set_exception(ScoringFailedError())
