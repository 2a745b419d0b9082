"""The queue before the scorers: what waits goes together, the bound and the deadline hold, and a failure is of one batch."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from rec_dist.models.prompt_cache import PromptCounts
from rec_dist.serving.batcher import (
    MOST_REQUESTS,
    Batcher,
    Limits,
    OverloadedError,
    ScoringFailedError,
    TooLateError,
)
from rec_dist.serving.engine import Answer, Failure, Outcomes, Query
from rec_dist.serving.metrics import Metrics

BAD = 666  # a history that fails


class Gate:
    """Replicas that answer when the test lets them: the score is the first item of the history."""

    def __init__(self, count: int = 1) -> None:
        self.count, self.batches, self.open, self.closed = count, [], asyncio.Event(), False  # type: ignore[var-annotated]
        self.fault: Exception | None = None

    async def answer(self, queries: list[Query]) -> Outcomes:
        self.batches.append([int(query.history[0]) for query in queries])
        await self.open.wait()
        if self.fault is not None:
            raise self.fault
        right = [Answer(query.history, query.history.astype(np.float64), {}, False) for query in queries]
        return Outcomes([Failure("bad luck") if answer.items[0] == BAD else answer for answer in right], PromptCounts(hits=1))

    def close(self) -> None:
        self.closed = True


def query(number: int) -> Query:
    return Query(np.asarray([number], dtype=np.int32), None)


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def started(gate: Gate, *, queue: int = 1000, deadline: float = 20.0, slow: bool = False) -> Batcher:
    batcher = Batcher(gate, Limits(queue, deadline), Metrics(), slow=slow)
    batcher.start()
    return batcher


def test_what_waits_while_the_scorer_is_busy_goes_together() -> None:
    async def test() -> None:
        gate = Gate()
        batcher = started(gate)
        tasks = [asyncio.create_task(batcher.answer(query(0), 1))]
        await settled()
        tasks += [asyncio.create_task(batcher.answer(query(number), 1)) for number in range(1, MOST_REQUESTS + 4)]
        await settled()
        gate.open.set()
        answers = await asyncio.gather(*tasks)
        assert [int(answer.scores[0]) for answer in answers] == list(range(MOST_REQUESTS + 4))  # type: ignore[union-attr]
        assert [len(batch) for batch in gate.batches] == [1, MOST_REQUESTS, 3]
        await batcher.close()
        assert gate.closed

    in_loop(test)


def test_idle_replicas_share_what_waits_and_a_batch_has_a_limit_of_scores() -> None:
    async def test() -> None:
        gate = Gate(count=3)
        batcher = started(gate)
        await settled()
        tasks = [asyncio.create_task(batcher.answer(query(number), 1)) for number in range(6)]
        await settled()
        assert sorted(map(len, gate.batches)) == [2, 2, 2]
        gate.open.set()
        await asyncio.gather(*tasks)
        await batcher.close()
        gate = Gate()
        batcher = started(gate, slow=True)
        await settled()
        tasks = [asyncio.create_task(batcher.answer(query(number), scores)) for number, scores in enumerate((300, 200, 50, 5000))]
        gate.open.set()
        await asyncio.gather(*tasks)
        assert gate.batches == [[0, 1], [2], [3]]
        await batcher.close()

    in_loop(test)


def test_a_full_queue_turns_requests_away_and_says_when_to_come_back() -> None:
    async def test() -> None:
        gate = Gate()
        batcher = started(gate, queue=3)
        tasks = [asyncio.create_task(batcher.answer(query(number), 1)) for number in range(3)]
        await settled()
        with pytest.raises(OverloadedError) as fault:
            await batcher.answer(query(3), 1)
        assert fault.value.seconds >= 1
        gate.open.set()
        await asyncio.gather(*tasks)
        assert isinstance(await batcher.answer(query(4), 1), Answer)
        await batcher.close()

    in_loop(test)


def test_a_request_whose_deadline_has_passed_is_not_scored() -> None:
    async def test() -> None:
        gate = Gate()
        batcher = started(gate, deadline=0.05)
        first, second = (asyncio.create_task(batcher.answer(query(number), 1)) for number in range(2))
        await settled()
        for task in (first, second):
            with pytest.raises(TooLateError):
                await task
        gate.open.set()
        assert isinstance(await batcher.answer(query(2), 1), Answer)
        assert [number for batch in gate.batches for number in batch] in ([0, 1, 2], [0, 2])
        await batcher.close()

    in_loop(test)


def test_a_late_request_behind_a_busy_scorer_never_reaches_it() -> None:
    async def test() -> None:
        gate = Gate()
        batcher = started(gate, deadline=0.05)
        busy = asyncio.create_task(batcher.answer(query(0), 1))
        await settled()
        assert gate.batches == [[0]]
        with pytest.raises(TooLateError):
            await batcher.answer(query(1), 1)
        with pytest.raises(TooLateError):
            await busy
        gate.open.set()
        assert isinstance(await batcher.answer(query(2), 1), Answer)
        assert gate.batches == [[0], [2]]
        await batcher.close()

    in_loop(test)


def test_a_failure_is_of_one_batch(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        gate = Gate()
        batcher = started(gate)
        gate.fault = RuntimeError("broken\nin two lines")
        gate.open.set()
        with pytest.raises(ScoringFailedError):
            await batcher.answer(query(0), 1)
        gate.fault = None
        assert isinstance(await batcher.answer(query(1), 1), Answer)
        await batcher.close()

    in_loop(test)
    assert "RuntimeError: broken in two lines" in caplog.text


def test_a_failure_of_one_request_is_its_own(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        gate = Gate()
        batcher = started(gate)
        tasks = [asyncio.create_task(batcher.answer(query(number), 1)) for number in (1, BAD, 2)]
        gate.open.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in found] == [Answer, ScoringFailedError, Answer]
        assert gate.batches == [[1, BAD, 2]]
        await batcher.close()

    in_loop(test)
    assert "failed on a request: bad" in caplog.text


def test_closing_waits_for_the_last_answer() -> None:
    async def test() -> None:
        gate = Gate()
        batcher = started(gate)
        task = asyncio.create_task(batcher.answer(query(0), 1))
        await settled()
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.1)
        assert not closing.done() and not gate.closed
        gate.open.set()
        assert isinstance(await task, Answer)
        await closing
        assert gate.closed

    in_loop(test)
