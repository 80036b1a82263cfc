"""Continuous batching: requests join and leave between steps, prompts are read in chunks among the decode steps."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from infer.engine.config import Counters, Limits
from infer.engine.cuda_graphs import Graphs
from infer.engine.fused_decoder import FusedDecoder, fits
from infer.engine.input_batch import Slots
from infer.engine.kv_cache import PagedCache, cache_tokens
from infer.engine.model_runner import Chosen, Chunk, Pending, Steps
from infer.engine.page_pool import PagePool
from infer.engine.prompt_lookup import Payoff
from infer.engine.scheduler import Running, Scheduler
from infer.quantization.weight_loader import load
from infer.requests.detokenizer import TextStream
from infer.requests.grammar import Constraint
from infer.requests.image_cache import ImageCache
from infer.requests.prepare import Request, prepare
from infer.requests.request import Event, Generation, Options, TokenLogprob
from infer.requests.structured_output import Guide, ThinkTokens
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.processing.answers import THINK_END
from phi4rv.processing.processor import Processor, Prompt

DEFAULT_LIMITS, GREEDY = Limits(), Options()
IDLE_CHUNK = 16384  # prompt tokens of one pass while nobody decodes


class Engine:
    """Answers prompts, many at a time.

    path: a folder in the published layout or one that ``infer.quantize`` wrote, or a pair (model, processor). device,
    dtype, kernels: as in ``phi4rv.load``; weights: as in ``weight_loader.load``. One thread drives it; ``prepare`` and
    ``counters`` may be used from others. UserError for limits that do not fit the model.
    """

    @torch.inference_mode()
    def __init__(
        self,
        path: str | Path | tuple[Phi4RV, Processor],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kernels: str | None = None,
        *,
        weights: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ):
        pair = path if isinstance(path, tuple) else load(path, device, dtype, kernels, weights)
        self.model: Phi4RV = pair[0]
        self.processor: Processor = pair[1]
        self.config, self.limits, self.counters = self.model.config, limits, Counters()
        self.stops = stop_tokens(self.processor)
        self.think = ThinkTokens.of(self.processor)
        self.images = ImageCache(limits.image_cache_bytes)

        on_gpu = self.model.device.type == "cuda"
        self.overlap = on_gpu if limits.overlap is None else limits.overlap
        # The definition of attention asks the host for lengths, which no graph can hold.
        capturable = on_gpu and self.model.ops.backends["paged_decode_attention"] != "torch"
        if limits.graphs and not capturable:
            raise UserError("graphs: need a GPU and --kernels triton or cuda for paged_decode_attention")
        graphs = Graphs(capturable if limits.graphs is None else limits.graphs)
        # Before the cache, which takes the memory that is left: some kernels read weights in an order of their own.
        fused = FusedDecoder(self.model.decoder) if fits(self.model.decoder) else None
        size = limits.page_size
        held = torch.float8_e4m3fn if limits.cache_dtype == "fp8" else self.model.decoder.norm.weight.dtype
        pages = 1 + -(-cache_tokens(self.config, held, self.model.device, limits) // size)
        self.cache = PagedCache(self.config, pages, size, held, self.model.device, self.model.ops)
        beyond = limits.speculate + 1
        most = -(-(self.config.context + beyond) // size)
        self.slots = Slots(self.config, limits.max_running, most, beyond, self.think, self.model.device)
        self.steps = Steps(self.model, fused, self.cache, self.slots, graphs)
        self.scheduler = Scheduler(PagePool(pages, size, limits.prefix_cache), limits.max_running)
        self.counters.pages_total = pages - 1
        if self.cache.fp8:
            self._calibrate()
        self._payoff = Payoff()
        self._number = 0
        self._pending: deque[Pending] = deque()
        self._events: list[Event] = []
        self._last_read = 0.0

    # Requests in, events out.

    def prepare(self, prompt: Prompt, options: Options = GREEDY, which: str = "the prompt") -> Request:
        """Decodes the pictures and tokenizes, for ``submit``; from any thread. UserError for what cannot be asked."""
        if options.max_thinking_tokens is not None and self.think.end < 0:
            raise UserError(f"--max-thinking-tokens: the tokenizer has no {THINK_END}")
        constraint = Constraint(self.processor, options, self.stops) if options.constrained else None
        return prepare(self.processor, prompt, options, self.images, constraint, which)

    @torch.inference_mode()
    def submit(self, request: Request | Prompt, options: Options = GREEDY) -> int:
        """Queues a request and returns its number, which its events carry. ``options`` are for a prompt."""
        if isinstance(request, Prompt):
            request = self.prepare(request, options)
        asked, mode, constraint = request.options, request.prompt.mode, request.constraint
        self._number += 1
        entry = Running(
            number=self._number,
            request=request,
            room=min(self.config.context - len(request.ids), asked.max_new_tokens),
            stream=TextStream(self.processor, mode, asked.stop),
            guide=Guide(constraint.copy(), mode, self.think) if constraint else None,
        )
        self.counters.prompt_tokens += request.prompt_tokens
        self.counters.image_tokens += request.image_tokens
        self.scheduler.waiting.append(entry)
        if not entry.room:
            self._finish(entry, "length")
        self._gauge()
        return entry.number

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Ends a request, unless it is over: its pages are free at once, its last event comes with the next step."""
        for entry in [*self.scheduler.waiting, *self.scheduler.running]:
            if entry.number == number:
                self._finish(entry, "cancelled")
        self._gauge()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Records all CUDA graphs, where there are any, which takes seconds; else each is when it is needed."""
        with torch.cuda.device_of(self.slots.lengths):
            self.steps.warm_up(sorted({1, 1 + self.limits.speculate}))

    @property
    def busy(self) -> bool:
        """Whether there is anything to do or to tell."""
        return bool(self.scheduler.waiting or self.scheduler.running or self._pending or self._events)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One round: a pass over chunks of prompts, a decode step, and what the step before them (or they) brought."""
        with torch.cuda.device_of(self.slots.lengths):  # graphs and events are the current device's
            self._admit()
            launched = self._prefill() + self._decode()
            while len(self._pending) > (launched if self.overlap else 0):
                self._collect()
        self._gauge()
        events, self._events = self._events, []
        return events

    def stream(self, prompt: Prompt, options: Options = GREEDY) -> Iterator[Event]:
        """The events of one prompt as they come. Leaving the loop early cancels it. Other requests go on beside it, but
        their events are lost: drive several with ``submit`` and ``step``.
        """
        number = self.submit(prompt, options)
        over = False
        try:
            while not over:
                for event in self.step():
                    if event.request == number:
                        over = event.generation is not None
                        yield event
        finally:
            if not over:
                self.cancel(number)
                self.step()

    def generate(
        self, prompts: Sequence[Prompt], options: Options = GREEDY, progress: bool = False
    ) -> list[Generation]:
        """Answers in order; prompt i draws with seed + i. ``progress`` shows a bar. A prompt that cannot be asked ends
        the call with a UserError.
        """
        order: dict[int, int] = {}
        out: dict[int, Generation] = {}
        try:
            with tqdm(total=len(prompts), unit="answer", disable=not progress) as bar:
                while len(out) < len(prompts):
                    while len(order) < len(prompts) and len(self.scheduler.waiting) < self.limits.max_running:
                        order[self._submit_one_of(prompts, len(order), options)] = len(order)
                    for event in self.step():
                        if event.generation is not None and event.request in order:
                            out[order[event.request]] = event.generation
                            bar.update()
        finally:
            for number in [number for number, index in order.items() if index not in out]:
                self.cancel(number)
        return [out[index] for index in range(len(prompts))]

    def _submit_one_of(self, prompts: Sequence[Prompt], index: int, options: Options) -> int:
        sampling = replace(options.sampling, seed=options.sampling.seed + index)
        which = f"prompt {index + 1}" if len(prompts) > 1 else "the prompt"
        return self.submit(self.prepare(prompts[index], replace(options, sampling=sampling), which))

    # A round.

    def _admit(self) -> None:
        for entry in self.scheduler.admit():
            request = entry.request
            if entry.admitted is None:  # later, what it finds is its own
                entry.admitted, entry.cached_tokens = time.perf_counter(), entry.done
                self.counters.cached_prompt_tokens += entry.done
            arguments = (entry.known(), request.prompt_tokens, request.prompt.mode, request.options, entry.pages)
            self.slots.fill(entry.slot, *arguments)

    def _prefill(self) -> int:
        """Launches a pass over the next chunks of prompts that are not read yet. How many passes: 0 or 1."""
        running = self.scheduler.running
        budget = IDLE_CHUNK if not any(entry.prefilled for entry in running) else self.limits.chunk_tokens
        spans = []
        for entry in running:
            count = min(budget, entry.target - entry.done)
            if count > 0:
                spans.append((entry, entry.done, entry.done + count))
                budget -= count
        if not spans:
            return 0
        self._fetch_features(spans)
        chunks = [self._chunk(*span) for span in spans]
        ready = [entry for entry, _, end in spans if end == entry.target]
        self._set_masks(ready)
        chosen = self.steps.prefill(chunks, all(_plain(entry) for entry in ready))
        self.counters.prefill_passes += 1
        for entry, _, end in spans:
            entry.done = end
            self.scheduler.publish(entry, end)
            if end == entry.target:
                entry.features.clear()
        if chosen is None:
            return 0
        self._launched(chosen, ready, 1, None)
        return 1

    def _chunk(self, entry: Running, begin: int, end: int) -> Chunk:
        pieces = [
            picture.part(entry.features[picture.digest], begin, end)
            for picture in entry.request.pictures
            if picture.touches(begin, end)
        ]
        return Chunk(entry.slot, begin, entry.known()[begin:end].clamp(min=0), pieces, end == entry.target)

    def _fetch_features(self, spans: Sequence[tuple[Running, int, int]]) -> None:
        """Gives the requests the features of the pictures that their spans touch; the tower runs once for all."""
        wanted = [
            (entry, picture)
            for entry, begin, end in spans
            for picture in entry.request.pictures
            if picture.touches(begin, end) and picture.digest not in entry.features
        ]
        found = self.images.fetch([picture for _, picture in wanted], self.steps.encode_images)
        for (entry, picture), features in zip(wanted, found, strict=True):
            entry.features[picture.digest] = features
        self.counters.image_cache_hits, self.counters.image_cache_misses = self.images.hits, self.images.misses

    def _decode(self) -> int:
        """Launches a decode step of all requests whose prompt is read. How many steps: 0 or 1."""
        if any(entry.guide is not None for entry in self.scheduler.running):
            self._collect_all()  # a constraint must have seen the last token
        ready = [entry for entry in self.scheduler.running if self._may_decode(entry)]
        if not ready:
            return 0
        plain = all(_plain(entry) for entry in ready)
        bucket = self.steps.bucket(len(ready))
        width = 1
        if self.limits.speculate and not any(e.guide is not None for e in ready) and self._payoff.drafts(bucket):
            width += self.limits.speculate
        for entry in list(ready):
            self._grow(entry, width, ready)
        if not ready:
            return 0
        self._set_masks(ready)
        began = time.perf_counter()
        chosen, settled = self.steps.decode([entry.slot for entry in ready], width, plain)
        self.counters.decode_steps += 1
        self.counters.drafted_tokens += (width - 1) * len(ready)
        alone = all(entry.prefilled for entry in self.scheduler.running)
        timed = (bucket, width > 1, began) if settled and alone else None
        self._launched(chosen, ready, width, timed)
        return 1

    def _grow(self, entry: Running, width: int, ready: list[Running]) -> None:
        """Gives one of ``ready`` the pages of its next ``width`` rows. For them the request that came last goes back to
        the queue, and is no longer ready; it may be this one.
        """
        while entry in ready:
            begin = len(entry.pages)
            # Rows behind its last token need no place.
            pages = self.scheduler.grow(entry, min(entry.rows + width, len(entry.request.ids) + entry.room))
            if pages is not None:
                if pages:
                    self.slots.set_pages(entry.slot, begin, pages)
                return
            if self._pending:  # what is under way may end and free some
                self._collect_all()
                ready[:] = [e for e in ready if self._may_decode(e)]
            else:
                self.slots.clear(self.scheduler.running[-1].slot)
                gone = self.scheduler.preempt()
                self.counters.preemptions += 1
                if gone in ready:
                    ready.remove(gone)

    @staticmethod
    def _may_decode(entry: Running) -> bool:
        return not entry.finished and entry.prefilled and len(entry.answer) + entry.steps < entry.room

    # What a pass brought.

    def _launched(
        self, chosen: Chosen, entries: list[Running], width: int, timed: tuple[int, bool, float] | None
    ) -> None:
        for entry in entries:
            entry.in_flight += width
            entry.steps += 1
        asked = [e.request.options.logprobs for e in entries]
        most = max((n for n in asked if n is not None), default=None)
        self._pending.append(Pending(chosen, entries, width, most, timed))

    def _collect_all(self) -> None:
        while self._pending:
            self._collect()

    def _collect(self) -> None:
        """Reads what the oldest pass chose."""
        pending = self._pending.popleft()
        tokens, counted, probabilities = pending.read()
        brought = 0
        for row, entry in enumerate(pending.entries):
            entry.in_flight -= pending.width
            entry.steps -= 1
            if entry.finished:
                continue
            count = counted[row]
            brought += count
            self.counters.accepted_tokens += count - 1
            self._take(entry, tokens[row][:count], [] if probabilities is None else probabilities[row][:count])
        now = time.perf_counter()
        if pending.timed:
            bucket, drafted, began = pending.timed
            self._payoff.record(bucket, drafted, brought, now - max(began, self._last_read))
        self._last_read = now

    def _take(self, entry: Running, tokens: Sequence[int], probabilities: Sequence[TokenLogprob]) -> None:
        """Adds new tokens to an answer, up to where it ends, and tells of them."""
        if entry.first_token is None:
            entry.first_token = time.perf_counter()
        begin, deltas, reason = len(entry.answer), [], None
        while reason is None and (count := len(entry.answer) - begin) < len(tokens):
            token = tokens[count]
            if token in self.stops:
                reason = "stop"
                break
            complete = self._guided(entry, token)
            entry.answer.append(token)
            deltas.append(entry.stream.push([token]))  # one by one, so that the answer ends with what completes a stop
            if complete or deltas[-1].stopped:
                reason = "stop"
            elif len(entry.answer) == entry.room:
                reason = "length"
        new = entry.answer[begin:]
        self.counters.generated_tokens += len(new)
        wanted = entry.request.options.logprobs
        told = [] if wanted is None else [replace(p, top=p.top[:wanted]) for p in probabilities[: len(new)]]
        entry.logprobs += told
        thinking, text = "".join(d.thinking for d in deltas), "".join(d.text for d in deltas)
        event = Event(entry.number, tuple(new), thinking, text, tuple(told))
        reason = "error" if entry.error else reason
        if reason:
            self._finish(entry, reason, event)
        else:
            self.scheduler.publish(entry, entry.length - 1)
            self._events.append(event)

    def _guided(self, entry: Running, token: int) -> bool:
        """Tells a request's constraint of its next token. Whether nothing may follow."""
        if entry.guide is None:
            return False
        try:
            return entry.guide.accept(entry.answer, token)
        except UserError as error:
            entry.error = entry.error or str(error)
            return False

    def _finish(self, entry: Running, reason: str, event: Event | None = None) -> None:
        if entry.slot >= 0:
            if entry.prefilled and entry.answer:
                self.scheduler.publish(entry, entry.length - 1)
            self.slots.clear(entry.slot)
        self.scheduler.remove(entry)
        entry.finished = True
        rest = entry.stream.finish()
        now, request = time.perf_counter(), entry.request
        generation = Generation(
            prompt=request.prompt,
            prompt_tokens=request.prompt_tokens,
            image_tokens=request.image_tokens,
            token_ids=entry.answer,
            logprobs=entry.logprobs,
            thinking=entry.stream.thinking,
            text=entry.stream.text,
            finish_reason=reason,
            error=entry.error,
            cached_tokens=entry.cached_tokens,
            queue_seconds=(entry.admitted or now) - entry.submitted,
            first_token_seconds=(entry.first_token or now) - entry.submitted,
            total_seconds=now - entry.submitted,
        )
        event = event or Event(entry.number)
        thinking, text = event.thinking + rest.thinking, event.text + rest.text
        self._events.append(replace(event, thinking=thinking, text=text, generation=generation))
        self.counters.finished[reason] += 1

    def _set_masks(self, entries: list[Running]) -> None:
        """Tells the device what constrained requests may say next. One whose constraint fails ends with its step."""
        for entry in entries:
            if entry.guide is None:
                continue
            try:
                allowed = entry.guide.allowed(entry.answer)
            except UserError as error:
                entry.error = str(error)
                continue
            self.slots.allowed[entry.slot].copy_(allowed, non_blocking=True)

    def _gauge(self) -> None:
        counters, scheduler = self.counters, self.scheduler
        counters.running, counters.waiting = len(scheduler.running), len(scheduler.waiting)
        counters.pages_used = scheduler.pool.used

    def check(self) -> None:
        """AssertionError unless slots and pages add up; for tests."""
        self.scheduler.check()

    def _calibrate(self) -> None:
        """Sets the scales of an fp8 cache by a question of a few hundred tokens."""
        text = " ".join(
            f"{n}. What do you see in the picture, and where is it? Think it over, then say." for n in range(24)
        )
        ids = self.processor.encode(Prompt(text)).input_ids[: self.config.context].to(self.model.device)
        positions = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
        self.model.decoder(self.model.decoder.embed_tokens(ids), positions, self.cache.calibrate())


def _plain(entry: Running) -> bool:
    """Greedy, and nothing changes the logits."""
    sampling = entry.request.options.sampling
    return sampling.temperature == 0 and sampling.repetition_penalty == 1 and entry.guide is None


def stop_tokens(processor: Processor) -> set[int]:
    """End-of-text ids: the config's, and those of generation_config.json."""
    listed = json.loads(processor.files.get("generation_config.json", b"{}")).get("eos_token_id", [])
    return {processor.config.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
