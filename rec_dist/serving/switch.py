"""Which model answers, and how another one takes its place without a failed request.

The server looks at the run every two seconds. When the run is another one (the path is a link that was changed) or its finished.json
was written again, it loads the new model beside the old one, gives new requests to it, and lets the old one go when its last request
is answered. A run that cannot be loaded changes nothing but the log. Cost: for that time, the memory of both.
"""

import asyncio
import gc
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rec_dist.errors import UserError, one_line
from rec_dist.serving.batcher import Batcher, Limits
from rec_dist.serving.metrics import Metrics
from rec_dist.serving.served import Loaded, Served

logger = logging.getLogger(__name__)
_EVERY_SECONDS, _POLL_SECONDS = 2.0, 0.05


def stamp(run: Path) -> tuple[object, ...] | None:
    """What changes when a run is finished again, or when the path leads to another one; None while it is not finished."""
    try:
        status = (run / "finished.json").stat()
    except OSError:
        return None
    return str(run.resolve()), status.st_ino, status.st_mtime_ns, status.st_size


class Switch:
    """The model that answers.

    load: loads it anew, called in a thread. run: the folder to watch, None to watch nothing. seen: its stamp before the first load.
    """

    def __init__(
        self,
        first: Loaded,
        load: Callable[[], Loaded],
        limits: Limits,
        metrics: Metrics,
        *,
        run: Path | None,
        seen: tuple[object, ...] | None,
        every_seconds: float = _EVERY_SECONDS,
    ) -> None:
        self._load, self.limits, self._metrics = load, limits, metrics
        self._run, self._seen, self._every = run, seen, every_seconds
        self._closed = False
        self.now = self._served(first)
        self._tasks: set[asyncio.Task[None]] = set()

    def _batcher(self, loaded: Loaded) -> Batcher:
        return Batcher(loaded.replicas, self.limits, self._metrics, slow=loaded.slow)

    def _served(self, loaded: Loaded) -> Served:
        """Raises what Served does. Then, or if the server ended meanwhile, the replicas end here: nobody else knows them."""
        try:
            if self._closed:
                raise UserError("the server ends")
            return Served(loaded, self._batcher)
        except BaseException:
            loaded.replicas.close()
            raise

    @contextmanager
    def asked(self) -> Iterator[Served]:
        """The model for one request, which stays until the block is left, also if another one takes its place."""
        served = self.now
        served.requests += 1
        try:
            yield served
        finally:
            served.requests -= 1

    def start(self) -> None:
        """Begins to answer and to watch. Called in the event loop of the server."""
        self.now.batcher.start()
        if self._run is not None:
            self._spawn(self._watch(self._run))

    async def close(self) -> None:
        """Ends the watch, then every model once its requests are answered."""
        self._closed = True
        for task in self._tasks:
            if task.get_name() == "watch":
                task.cancel()
        await self.now.batcher.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str = "watch") -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, run: Path) -> None:
        while True:
            await asyncio.sleep(self._every)
            found = await asyncio.to_thread(stamp, run)
            if found is None or found == self._seen:
                continue
            self._seen = found
            logger.info(f"{run} is another model now; loading it beside the old one")
            try:
                new = await asyncio.to_thread(lambda: self._served(self._load()))
            except Exception as fault:
                kind = "" if isinstance(fault, UserError) else f"{type(fault).__name__}: "
                logger.warning(f"the new model of {run} cannot be served, the old one goes on: {kind}{one_line(fault, 500)}")
                self._metrics.models.labels("refused").inc()
                continue
            new.batcher.start()
            old, self.now = self.now, new
            self._metrics.models.labels("taken").inc()
            logger.info(f"serving model {new.about['model']}; before it was {old.about['model']}")
            self._spawn(self._let_go(old), "old")

    async def _let_go(self, old: Served) -> None:
        with suppress(asyncio.CancelledError):
            while old.requests:  # some may still look for their user's history
                await asyncio.sleep(_POLL_SECONDS)
            try:
                await old.batcher.close()
            except Exception as fault:  # of a cluster that does not answer; the new model goes on
                logger.warning(f"the scorers of model {old.about['model']} did not end: {one_line(fault, 500)}")
        gc.collect()
