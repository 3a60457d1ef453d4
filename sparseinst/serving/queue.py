"""Admit a bounded number of requests, and run their predictions in a bounded number of threads."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import HTTPException
from starlette.requests import ClientDisconnect

from sparseinst.serving.limits import Limits, Upload

Answer = TypeVar("Answer")

# A prediction without an answer that took this share of the time by itself is too slow; others waited in the queue.
TOO_SLOW = 0.5


class PredictionQueue:
    """Take uploads, and run a job on each in a thread, in the order of their arrival.

    All methods run in the event loop.

    Args:
        limits: of the service.

    Attributes:
        num_running: requests that wait or are predicted.
    """

    def __init__(self, limits: Limits) -> None:
        self.num_running = 0
        self._limits = limits
        self._turns = asyncio.Semaphore(limits.workers)
        # Engines keep memory for each thread that used them.
        self._threads = ThreadPoolExecutor(limits.workers, thread_name_prefix="predict")

    def close(self) -> None:
        """Let running jobs end, and start no other."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(self, upload: Upload, job: Callable[[bytes], Answer]) -> Answer:
        """Read an upload, and return what the job returns for it.

        A job that runs cannot be stopped: it occupies the queue until it ends, also where its client left.

        Raises:
            HTTPException: 429: the queue is full; 413 or 400: the upload is refused; 408: it took too long;
                503: no answer in time.
            starlette.requests.ClientDisconnect: the client left.
        """
        if self.num_running >= self._limits.workers + self._limits.waiting:
            raise HTTPException(
                429, f"{self.num_running} requests are waiting, and no more may; try again", {"Retry-After": "1"}
            )
        self.num_running += 1
        try:
            task, started, seconds = await self._start(upload, job)
        except BaseException:
            self.num_running -= 1
            raise
        return await self._wait(upload, task, started, seconds)

    async def _start(
        self, upload: Upload, job: Callable[[bytes], Answer]
    ) -> tuple[asyncio.Task, asyncio.Future, float]:
        """Read the upload, and return the task of the job, the time of its start, and the seconds that are left."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        seconds = self._limits.seconds
        try:
            data = await asyncio.wait_for(upload.read(), seconds)
        except asyncio.TimeoutError as error:
            raise HTTPException(408, f"The upload took longer than {seconds:g} s") from error
        started = loop.create_future()

        async def run() -> Answer:
            async with self._turns:
                started.set_result(loop.time())
                return await loop.run_in_executor(self._threads, job, data)

        task = loop.create_task(run())
        task.add_done_callback(self._end)
        return task, started, seconds - (loop.time() - start)

    async def _wait(self, upload: Upload, task: asyncio.Task, started: asyncio.Future, seconds: float) -> Answer:
        gone = asyncio.create_task(upload.client_left())
        try:
            await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientDisconnect
            text = f"No answer within {self._limits.seconds:g} s"
            if started.done() and gone.get_loop().time() - started.result() > TOO_SLOW * self._limits.seconds:
                # Another try would predict the image again, and take as long.
                raise HTTPException(503, f"{text}: the prediction is too slow, send a smaller image")
            raise HTTPException(503, f"{text}; try again", {"Retry-After": "1"})
        finally:
            gone.cancel()
            # A task that is cancelled while its thread runs would give its turn away too early.
            if not started.done():
                task.cancel()

    def _end(self, task: asyncio.Task) -> None:
        self.num_running -= 1
        # An exception that nobody reads would be logged with a traceback.
        if not task.cancelled():
            task.exception()
