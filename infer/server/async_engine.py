"""The engine in a thread of its own, and its outputs on the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from infer.engine.engine import Engine
from infer.requests.outputs import StreamEvent
from infer.requests.request import Request
from infer.requests.sampling_params import SamplingParams
from infer.server.errors import ApiError, from_user_error
from phi4rv.errors import ContextLengthError, UserError
from phi4rv.processing.processor import Processor, Prompt

MAX_UNREAD_EVENTS = 1024
PIECE_CHARACTERS = 1 << 14
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Admission:
    """Of one call: its requests that count as active, and the permits to prepare requests that it holds."""

    num_requests: int
    num_permits: int = 0


class _OutputCollector:
    """The events of one ``generate`` call that are not read yet. Used on the event loop alone, but for ``choices``."""

    def __init__(self, num_requests: int, admission: Admission):
        self.num_unfinished, self.admission = num_requests, admission
        self.events: list[tuple[int, StreamEvent]] = []
        self.error: ApiError | None = None
        self.ready = asyncio.Event()
        self.choices: dict[int, int] = {}  # request id -> index in the call; used in the engine's thread alone

    def put(self, choice: int, event: StreamEvent) -> None:
        self.events.append((choice, event))
        self.num_unfinished -= event.generation is not None
        self.ready.set()

    def fail(self, error: ApiError) -> None:
        self.error = error
        self.events.clear()
        self.ready.set()


class AsyncEngine:
    """Drives an engine. ``max_waiting``: requests that may wait beside the ``config.max_running`` that run.

    Only twice as many as may run are prepared (their images decoded) at a time; the others wait unprepared. If the
    engine fails, ``failure`` holds the exception, every open and later request gets 500, and the thread ends.
    """

    def __init__(self, engine: Engine, max_waiting: int, max_unread: int = MAX_UNREAD_EVENTS, workers: int = 2):
        self.engine, self.failure = engine, None  # type: Engine, Exception | None
        self.num_active = 0  # requests between admission and their end
        self.max_running = engine.config.max_running
        self._max_active, self._max_unread = self.max_running + max_waiting, max_unread
        self._permits = asyncio.Semaphore(2 * self.max_running)
        self._acquiring = asyncio.Lock()  # one call acquires all its permits before the next begins: no deadlock
        self._collectors: set[_OutputCollector] = set()
        self._pool = ThreadPoolExecutor(workers, "prepare")
        self._loop = asyncio.get_running_loop()
        self._wakeup = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._by_request_id: dict[int, _OutputCollector] = {}  # used in the engine's thread alone
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- on the event loop ---

    def check_alive(self) -> None:
        """ApiError 500 after a failure."""
        if self.failure is not None:
            raise _engine_failed()

    def check_capacity(self, num_requests: int = 1) -> None:
        """ApiError 500 after a failure, 429 if that many more requests would be too many."""
        self.check_alive()
        if self.num_active + num_requests > self._max_active:
            raise ApiError(
                429, f"{self.num_active} requests are running or waiting; try again later", code="queue_full"
            )

    @asynccontextmanager
    async def admit(self, num_requests: int) -> AsyncIterator[Admission]:
        """Waits until that many requests may be prepared. Released when the engine is done with them, at the latest
        when the context is left. ApiError 429 or 500 at once, if any.
        """
        self.check_capacity(num_requests)
        self.num_active += num_requests
        admission = Admission(num_requests)
        try:
            async with self._acquiring:
                while admission.num_permits < min(num_requests, 2 * self.max_running):
                    await self._permits.acquire()
                    admission.num_permits += 1
            yield admission
        finally:
            self._release(admission)

    def _release(self, admission: Admission) -> None:
        self.num_active -= admission.num_requests
        for _ in range(admission.num_permits):
            self._permits.release()
        admission.num_requests = admission.num_permits = 0

    async def prepare(self, prompt: Prompt, sampling_params: SamplingParams) -> Request:
        """Decodes and tokenizes in a thread of the pool. ApiError 400 for what is wrong with the prompt."""
        try:
            await self._loop.run_in_executor(self._pool, check_length, self.engine.processor, prompt)
            return await self._loop.run_in_executor(self._pool, self.engine.prepare, prompt, sampling_params)
        except UserError as error:
            raise from_user_error(error) from None

    async def generate(
        self, requests: Sequence[Request], admission: Admission
    ) -> AsyncGenerator[list[tuple[int, StreamEvent]], None]:
        """Yields the events since the last time: (index of the request, event). Ends when all requests are finished.

        Closed early, cancels what still runs: use ``contextlib.aclosing``. ApiError 500 if the engine fails, 408 if
        more than ``max_unread`` events are not read.
        """
        self.check_alive()
        collector = _OutputCollector(len(requests), admission)
        self._collectors.add(collector)
        self._post(lambda: self._submit(collector, requests))
        try:
            while collector.num_unfinished or collector.events:
                await collector.ready.wait()
                collector.ready.clear()
                if collector.error is not None:
                    raise collector.error
                batch, collector.events = collector.events, []
                yield batch
        finally:
            self._collectors.discard(collector)
            if collector.num_unfinished:
                self._post(lambda: self._cancel(collector))

    async def close(self) -> None:
        """Ends the thread and the pool; what still runs is cancelled."""
        with self._wakeup:
            self._stopped = True
            self._wakeup.notify()
        await self._loop.run_in_executor(None, self._thread.join)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _post(self, command: Callable[[], None]) -> None:
        with self._wakeup:
            self._commands.append(command)
            self._wakeup.notify()

    def _fail(self, error: Exception) -> None:
        self.failure = error
        for collector in self._collectors:
            collector.fail(_engine_failed())

    def _deliver(self, events: list[tuple[_OutputCollector, int, StreamEvent]]) -> None:
        for collector, choice, event in events:
            if collector.error is None:
                collector.put(choice, event)
            if len(collector.events) > self._max_unread:
                collector.fail(ApiError(408, "the answer was read too slowly", code="slow_reader"))
                self._post(lambda collector=collector: self._cancel(collector))  # type: ignore[misc]
            if collector.error is not None or not collector.num_unfinished:
                self._release(collector.admission)  # however long its client still reads

    # --- in the engine's thread ---

    def _run(self) -> None:
        try:
            while self._run_commands():
                self._dispatch(self.engine.step())
        except Exception as error:
            _log.exception("the engine failed")
            self._loop.call_soon_threadsafe(self._fail, error)

    def _run_commands(self) -> bool:
        """Runs the posted commands; waits for one if there is nothing to do. False when the thread is to end."""
        with self._wakeup:
            self._wakeup.wait_for(lambda: self._commands or self._stopped or self.engine.has_unfinished_requests)
            commands, self._commands = self._commands, []
        for command in commands:
            command()
        return not self._stopped

    def _submit(self, collector: _OutputCollector, requests: Sequence[Request]) -> None:
        for choice, request in enumerate(requests):
            try:
                request_id = self.engine.submit(request)
            except UserError as error:
                self._loop.call_soon_threadsafe(collector.fail, from_user_error(error))
                return
            collector.choices[request_id] = choice
            self._by_request_id[request_id] = collector

    def _cancel(self, collector: _OutputCollector) -> None:
        for request_id in collector.choices:
            if self._by_request_id.pop(request_id, None) is not None:
                self.engine.cancel(request_id)

    def _dispatch(self, events: Sequence[StreamEvent]) -> None:
        sent = []
        for event in events:
            collector = self._by_request_id.get(event.request_id)
            if collector is not None:  # None: cancelled, nobody waits for its last event
                sent.append((collector, collector.choices[event.request_id], event))
            if event.generation is not None:
                self._by_request_id.pop(event.request_id, None)
        if sent:
            self._loop.call_soon_threadsafe(self._deliver, sent)


def check_length(processor: Processor, prompt: Prompt) -> None:
    """WindowError for a text of far more tokens than the window holds.

    It is tokenized in pieces, and no further than those that fill the window; cuts change the count a little, so what
    is near the window is left to the engine. ``encode_batch_fast`` lets other threads run, which ``encode`` does not.
    """
    window, count = processor.config.context, 0
    texts = [message.content for message in prompt.messages()]
    if sum(map(len, texts)) <= window:
        return
    for text in texts:
        for begin in range(0, len(text), PIECE_CHARACTERS):
            count += len(processor.tokenizer.encode_batch_fast([text[begin : begin + PIECE_CHARACTERS]])[0].ids)
            if count > window + window // 4:
                raise ContextLengthError(f"the prompt has more than {count} tokens, the model's window holds {window}")


def _engine_failed() -> ApiError:
    return ApiError(500, "the engine has failed; the server's log says why", code="engine_failed")
