"""The engine in a thread of its own, and its answers on the asyncio side."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from infer.engine.engine import Engine
from infer.requests.prepare import Request
from infer.requests.request import Event, Options
from infer.server.errors import ApiError, of_user_error
from phi4rv.errors import ContextLengthError, UserError
from phi4rv.processing.processor import Processor, Prompt

MOST_UNREAD = 1024
PIECE = 1 << 14  # characters
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Place:
    """Of so many requests ``held`` places in the queue, ``taken`` of them among those that are prepared."""

    held: int
    taken: int = 0


class _Mailbox:
    """The events of one ask that have not been read yet. Used on the event loop alone, but for ``numbers``."""

    def __init__(self, requests: int, place: Place):
        self.remaining, self.place = requests, place
        self.unread: list[tuple[int, Event]] = []
        self.error: ApiError | None = None
        self.filled = asyncio.Event()
        self.numbers: dict[int, int] = {}  # the engine's number -> which request of the ask; the thread's own

    def put(self, choice: int, event: Event) -> None:
        self.unread.append((choice, event))
        self.remaining -= event.generation is not None
        self.filled.set()

    def fail(self, error: ApiError) -> None:
        self.error = error
        self.unread.clear()
        self.filled.set()


class Background:
    """Drives an engine. ``most_waiting``: requests that may wait beside the ``limits.max_running`` that run.

    Only twice as many as may run are prepared (their pictures decoded) at a time; the others wait as they came. If the
    engine fails, ``failure`` says why, every open and later request gets 500, and the thread ends.
    """

    def __init__(self, engine: Engine, most_waiting: int, most_unread: int = MOST_UNREAD, workers: int = 2):
        self.engine, self.failure = engine, None  # type: Engine, Exception | None
        self.active = 0  # requests between admission and their end
        self.running = engine.limits.max_running
        self._most_active, self._most_unread = self.running + most_waiting, most_unread
        self._places = asyncio.Semaphore(2 * self.running)
        self._taking = asyncio.Lock()  # one takes all its places before the next begins: none waits for the other
        self._mailboxes: set[_Mailbox] = set()
        self._pool = ThreadPoolExecutor(workers, "prepare")
        self._loop = asyncio.get_running_loop()
        self._news = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._open: dict[int, _Mailbox] = {}  # by the engine's number; the thread's own
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- on the event loop ---

    def check_alive(self) -> None:
        """ApiError 500 after a failure."""
        if self.failure is not None:
            raise _broken()

    def check_room(self, requests: int = 1) -> None:
        """ApiError 500 after a failure, 429 when so many more requests would be too many."""
        self.check_alive()
        if self.active + requests > self._most_active:
            raise ApiError(429, f"{self.active} requests are running or waiting; try again later", code="queue_full")

    @asynccontextmanager
    async def admitted(self, requests: int) -> AsyncIterator[Place]:
        """Waits for the places of so many requests, and frees them when the engine is done with them, at the latest
        when this is left. ApiError 429 or 500 at once, if any.
        """
        self.check_room(requests)
        self.active += requests
        place = Place(requests)
        try:
            async with self._taking:
                while place.taken < min(requests, 2 * self.running):
                    await self._places.acquire()
                    place.taken += 1
            yield place
        finally:
            self._leave(place)

    def _leave(self, place: Place) -> None:
        self.active -= place.held
        for _ in range(place.taken):
            self._places.release()
        place.held = place.taken = 0

    async def prepare(self, prompt: Prompt, options: Options) -> Request:
        """Decodes and tokenizes in a thread of the pool. ApiError 400 for what is wrong with the prompt."""
        try:
            await self._loop.run_in_executor(self._pool, check_length, self.engine.processor, prompt)
            return await self._loop.run_in_executor(self._pool, self.engine.prepare, prompt, options)
        except UserError as error:
            raise of_user_error(error) from None

    async def ask(self, requests: Sequence[Request], place: Place) -> AsyncGenerator[list[tuple[int, Event]], None]:
        """Yields what has come since the last time: (which request, event). Ends when all have ended.

        Left early, cancels what still runs: close it with ``contextlib.aclosing``. ApiError 500 if the engine fails,
        408 if more than ``most_unread`` events were not taken.
        """
        self.check_alive()
        mailbox = _Mailbox(len(requests), place)
        self._mailboxes.add(mailbox)
        self._post(lambda: self._submit(mailbox, requests))
        try:
            while mailbox.remaining or mailbox.unread:
                await mailbox.filled.wait()
                mailbox.filled.clear()
                if mailbox.error is not None:
                    raise mailbox.error
                batch, mailbox.unread = mailbox.unread, []
                yield batch
        finally:
            self._mailboxes.discard(mailbox)
            if mailbox.remaining:
                self._post(lambda: self._cancel(mailbox))

    async def close(self) -> None:
        """Ends the thread and the pool; what still runs is cancelled."""
        with self._news:
            self._stopped = True
            self._news.notify()
        await self._loop.run_in_executor(None, self._thread.join)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _post(self, command: Callable[[], None]) -> None:
        with self._news:
            self._commands.append(command)
            self._news.notify()

    def _fail(self, error: Exception) -> None:
        self.failure = error
        for mailbox in self._mailboxes:
            mailbox.fail(_broken())

    def _deliver(self, events: list[tuple[_Mailbox, int, Event]]) -> None:
        for mailbox, choice, event in events:
            if mailbox.error is None:
                mailbox.put(choice, event)
            if len(mailbox.unread) > self._most_unread:
                mailbox.fail(ApiError(408, "the answer was read too slowly", code="slow_reader"))
                self._post(lambda mailbox=mailbox: self._cancel(mailbox))  # type: ignore[misc]
            if mailbox.error is not None or not mailbox.remaining:
                self._leave(mailbox.place)  # however long its client still reads

    # --- in the engine's thread ---

    def _run(self) -> None:
        try:
            while self._obey():
                self._send(self.engine.step())
        except Exception as error:
            _log.exception("the engine failed")
            self._loop.call_soon_threadsafe(self._fail, error)

    def _obey(self) -> bool:
        """Runs the commands; waits for one if there is nothing to do. False when it is time to end."""
        with self._news:
            self._news.wait_for(lambda: self._commands or self._stopped or self.engine.busy)
            commands, self._commands = self._commands, []
        for command in commands:
            command()
        return not self._stopped

    def _submit(self, mailbox: _Mailbox, requests: Sequence[Request]) -> None:
        for choice, request in enumerate(requests):
            try:
                number = self.engine.submit(request)
            except UserError as error:
                self._loop.call_soon_threadsafe(mailbox.fail, of_user_error(error))
                return
            mailbox.numbers[number] = choice
            self._open[number] = mailbox

    def _cancel(self, mailbox: _Mailbox) -> None:
        for number in mailbox.numbers:
            if self._open.pop(number, None) is not None:
                self.engine.cancel(number)

    def _send(self, events: Sequence[Event]) -> None:
        sent = []
        for event in events:
            mailbox = self._open.get(event.request)
            if mailbox is not None:  # one that was cancelled ends with an event that nobody waits for
                sent.append((mailbox, mailbox.numbers[event.request], event))
            if event.generation is not None:
                self._open.pop(event.request, None)
        if sent:
            self._loop.call_soon_threadsafe(self._deliver, sent)


def check_length(processor: Processor, prompt: Prompt) -> None:
    """WindowError for a text of far more tokens than the window holds.

    It is cut in pieces, so that it is known after those that fill the window; cuts change the count a little, so what
    is near the window is left to the engine. ``encode_batch_fast`` lets other threads run, which ``encode`` does not.
    """
    window, count = processor.config.context, 0
    texts = [message.content for message in prompt.messages()]
    if sum(map(len, texts)) <= window:
        return
    for text in texts:
        for begin in range(0, len(text), PIECE):
            count += len(processor.tokenizer.encode_batch_fast([text[begin : begin + PIECE]])[0].ids)
            if count > window + window // 4:
                raise ContextLengthError(f"the prompt has more than {count} tokens, the model's window holds {window}")


def _broken() -> ApiError:
    return ApiError(500, "the engine has failed; the server's log says why", code="engine_failed")
