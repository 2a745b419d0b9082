"""A scorer in the server's own process: for one machine, without Ray."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from rec_dist.serving.engine import Engine, Outcomes, Query


class InProcess:
    """Implements Replicas by one thread, beside that of the server."""

    count = 1

    def __init__(self, engine: Engine) -> None:
        self._engine, self._thread = engine, ThreadPoolExecutor(1, thread_name_prefix="scorer")

    async def answer(self, queries: list[Query]) -> Outcomes:
        """As Replicas.answer."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.answer, queries)

    def close(self) -> None:
        """As Replicas.close."""
        self._thread.submit(self._engine.close).result()
        self._thread.shutdown()
