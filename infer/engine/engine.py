"""Continuous batching: requests join and leave between steps, prompts are prefilled in chunks beside decoding."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from infer.engine.config import EngineConfig, EngineStats
from infer.engine.cuda_graphs import CudaGraphs
from infer.engine.fused_decoder import FusedDecoder, is_supported
from infer.engine.input_batch import InputBatch
from infer.engine.kv_cache import PagedKVCache, cache_capacity
from infer.engine.model_runner import AsyncOutput, ModelRunner, PrefillChunk, SamplerOutput
from infer.engine.output_processor import OutputProcessor, stop_token_ids
from infer.engine.page_pool import PagePool
from infer.engine.scheduler import RequestState, Scheduler
from infer.engine.speculative_decoding import DynamicSpeculation
from infer.quantization.weight_loader import load
from infer.requests.detokenizer import Detokenizer
from infer.requests.grammar import Grammar
from infer.requests.image_cache import ImageCache
from infer.requests.outputs import Generation, StreamEvent
from infer.requests.request import Request, prepare_request
from infer.requests.sampling_params import SamplingParams
from infer.requests.structured_output import StructuredOutput, ThinkingTokens
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.processing.answers import THINK_END
from phi4rv.processing.processor import Processor, Prompt

DEFAULT_CONFIG, GREEDY = EngineConfig(), SamplingParams()
IDLE_CHUNK_TOKENS = 16384  # prompt tokens of one pass while no request decodes


class Engine:
    """Answers prompts, many at a time.

    path: a folder in the published layout or one that ``infer.quantize`` wrote, or a pair (model, processor). device,
    dtype, kernels: as in ``phi4rv.load``; weights: as in ``weight_loader.load``. One thread drives it; ``prepare`` and
    ``stats`` may be used from others. UserError for a config that does not fit the model.
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
        config: EngineConfig = DEFAULT_CONFIG,
    ):
        pair = path if isinstance(path, tuple) else load(path, device, dtype, kernels, weights)
        self.model: Phi4RV = pair[0]
        self.processor: Processor = pair[1]
        self.config, self.model_config, self.stats = config, self.model.config, EngineStats()
        self.stop_token_ids = stop_token_ids(self.processor)
        self.thinking_tokens = ThinkingTokens.from_processor(self.processor)
        self.image_cache = ImageCache(config.image_cache_bytes)

        model, context = self.model, self.model_config.context
        on_gpu = model.device.type == "cuda"
        self.overlap = on_gpu if config.overlap is None else config.overlap
        # The definition of attention reads lengths on the host, which no graph can capture.
        capturable = on_gpu and model.ops.backends["paged_decode_attention"] != "torch"
        if config.graphs and not capturable:
            raise UserError("graphs: need a GPU and --kernels triton or cuda for paged_decode_attention")
        cuda_graphs = CudaGraphs(capturable if config.graphs is None else config.graphs)
        # Before the cache, which takes the memory that is left: some kernels repack the weights.
        fused_decoder = FusedDecoder(model.decoder) if is_supported(model.decoder) else None
        size = config.page_size
        cache_dtype = torch.float8_e4m3fn if config.cache_dtype == "fp8" else model.decoder.norm.weight.dtype
        num_pages = 1 + -(-cache_capacity(self.model_config, cache_dtype, model.device, config) // size)
        self.kv_cache = PagedKVCache(self.model_config, num_pages, size, cache_dtype, model.device, model.ops)
        lookahead = config.speculate + 1
        max_pages = -(-(context + lookahead) // size)
        self.input_batch = InputBatch(
            self.model_config, config.max_running, max_pages, lookahead, self.thinking_tokens, model.device
        )
        self.model_runner = ModelRunner(model, fused_decoder, self.kv_cache, self.input_batch, cuda_graphs)
        self.scheduler = Scheduler(PagePool(num_pages, size, config.prefix_cache), config.max_running)
        self.output_processor = OutputProcessor(self.scheduler, self.input_batch, self.stop_token_ids, self.stats)
        self.stats.pages_total = num_pages - 1
        if self.kv_cache.fp8:
            self._set_kv_cache_scales()
        self._speculation = DynamicSpeculation()
        self._last_request_id = 0
        self._in_flight: deque[AsyncOutput] = deque()
        self._last_output_time = 0.0

    # Requests in, events out.

    def prepare(self, prompt: Prompt, sampling_params: SamplingParams = GREEDY, which: str = "the prompt") -> Request:
        """Decodes the images and tokenizes, for ``submit``; from any thread. UserError for what is not possible."""
        if sampling_params.max_thinking_tokens is not None and self.thinking_tokens.end < 0:
            raise UserError(f"--max-thinking-tokens: the tokenizer has no {THINK_END}")
        constrained = sampling_params.constrained
        grammar = Grammar(self.processor, sampling_params, self.stop_token_ids) if constrained else None
        return prepare_request(self.processor, prompt, sampling_params, self.image_cache, grammar, which)

    @torch.inference_mode()
    def submit(self, request: Request | Prompt, sampling_params: SamplingParams = GREEDY) -> int:
        """Queues a request and returns its id, which its events carry. ``sampling_params`` are for a Prompt."""
        if isinstance(request, Prompt):
            request = self.prepare(request, sampling_params)
        params, mode, grammar = request.sampling_params, request.prompt.mode, request.grammar
        self._last_request_id += 1
        state = RequestState(
            request_id=self._last_request_id,
            request=request,
            max_new_tokens=min(self.model_config.context - request.prompt_tokens, params.max_new_tokens),
            detokenizer=Detokenizer(self.processor, mode, params.stop),
            structured_output=StructuredOutput(grammar.copy(), mode, self.thinking_tokens) if grammar else None,
        )
        self.stats.prompt_tokens += request.prompt_tokens
        self.stats.image_tokens += request.image_tokens
        self.scheduler.waiting.append(state)
        if not state.max_new_tokens:
            self.output_processor.finish(state, "length")
        self._update_stats()
        return state.request_id

    @torch.inference_mode()
    def cancel(self, request_id: int) -> None:
        """Ends a request, unless it is over: its pages are free at once, its last event comes with the next step."""
        for state in [*self.scheduler.waiting, *self.scheduler.running]:
            if state.request_id == request_id:
                self.output_processor.finish(state, "cancelled")
        self._update_stats()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures all CUDA graphs, where there are any, which takes seconds; else each when it is first needed."""
        with torch.cuda.device_of(self.input_batch.page_table):
            self.model_runner.warm_up(sorted({1, 1 + self.config.speculate}))

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether ``step`` has anything to do, or events to return."""
        return bool(self.scheduler.waiting or self.scheduler.running or self._in_flight or self.output_processor.events)

    @torch.inference_mode()
    def step(self) -> list[StreamEvent]:
        """Launches a prefill pass and a decode step, and returns the events of those before them (without ``overlap``:
        of these).
        """
        with torch.cuda.device_of(self.input_batch.page_table):  # graphs and events are the current device's
            self._admit()
            launched = self._prefill() + self._decode()
            while len(self._in_flight) > (launched if self.overlap else 0):
                self._process_oldest()
        self._update_stats()
        return self.output_processor.take_events()

    def stream(self, prompt: Prompt, sampling_params: SamplingParams = GREEDY) -> Iterator[StreamEvent]:
        """The events of one prompt as they come. Leaving the loop early cancels it. Other requests go on beside it, but
        their events are lost: drive several with ``submit`` and ``step``.
        """
        request_id = self.submit(prompt, sampling_params)
        finished = False
        try:
            while not finished:
                for event in self.step():
                    if event.request_id == request_id:
                        finished = event.generation is not None
                        yield event
        finally:
            if not finished:
                self.cancel(request_id)
                self.step()

    def generate(
        self, prompts: Sequence[Prompt], sampling_params: SamplingParams = GREEDY, progress: bool = False
    ) -> list[Generation]:
        """Answers in order; prompt i is sampled with seed + i. ``progress`` shows a bar. A prompt that is not possible
        ends the call with a UserError.
        """
        index_by_id: dict[int, int] = {}
        out: dict[int, Generation] = {}
        try:
            with tqdm(total=len(prompts), unit="answer", disable=not progress) as bar:
                while len(out) < len(prompts):
                    while len(index_by_id) < len(prompts) and len(self.scheduler.waiting) < self.config.max_running:
                        index = len(index_by_id)
                        index_by_id[self._submit_one_of(prompts, index, sampling_params)] = index
                    for event in self.step():
                        if event.generation is not None and event.request_id in index_by_id:
                            out[index_by_id[event.request_id]] = event.generation
                            bar.update()
        finally:
            for request_id in [request_id for request_id, index in index_by_id.items() if index not in out]:
                self.cancel(request_id)
        return [out[index] for index in range(len(prompts))]

    def _submit_one_of(self, prompts: Sequence[Prompt], index: int, sampling_params: SamplingParams) -> int:
        seeded = replace(sampling_params, seed=sampling_params.seed + index)
        which = f"prompt {index + 1}" if len(prompts) > 1 else "the prompt"
        return self.submit(self.prepare(prompts[index], seeded, which))

    # A step.

    def _admit(self) -> None:
        for state in self.scheduler.admit():
            request = state.request
            if state.scheduled_time is None:  # after a preemption it would find its own pages
                state.scheduled_time, state.cached_tokens = time.perf_counter(), state.num_computed_tokens
                self.stats.cached_prompt_tokens += state.num_computed_tokens
            mode, params = request.prompt.mode, request.sampling_params
            self.input_batch.add_request(
                state.req_index, state.token_ids(), request.prompt_tokens, mode, params, state.pages
            )

    def _prefill(self) -> int:
        """Launches a pass over the next chunks of unfinished prompts. Returns how many results follow: 0 or 1."""
        running = self.scheduler.running
        budget = self.config.chunk_tokens if any(state.prefilled for state in running) else IDLE_CHUNK_TOKENS
        spans = []
        for state in running:
            count = min(budget, state.num_prefill_tokens - state.num_computed_tokens)
            if count > 0:
                spans.append((state, state.num_computed_tokens, state.num_computed_tokens + count))
                budget -= count
        if not spans:
            return 0
        self._encode_images(spans)
        chunks = [_prefill_chunk(*span) for span in spans]
        sampling = [state for state, _, end in spans if end == state.num_prefill_tokens]
        self._set_token_masks(sampling)
        output = self.model_runner.prefill(chunks, _all_greedy(sampling))
        self.stats.prefill_passes += 1
        for state, _, end in spans:
            state.num_computed_tokens = end
            self.scheduler.cache_pages(state, end)
            if end == state.num_prefill_tokens:
                state.image_features.clear()
        if output is None:
            return 0
        self._enqueue(output, sampling, 1, None)
        return 1

    def _encode_images(self, spans: Sequence[tuple[RequestState, int, int]]) -> None:
        """Gives the requests the features of the images that their spans overlap; one call of the tower for all."""
        needed = [
            (state, image)
            for state, begin, end in spans
            for image in state.request.images
            if image.overlaps(begin, end) and image.digest not in state.image_features
        ]
        found = self.image_cache.get_or_encode([image for _, image in needed], self.model_runner.encode_images)
        for (state, image), features in zip(needed, found, strict=True):
            state.image_features[image.digest] = features
        self.stats.image_cache_hits, self.stats.image_cache_misses = self.image_cache.hits, self.image_cache.misses

    def _decode(self) -> int:
        """Launches a decode step of all requests that are prefilled. Returns how many results follow: 0 or 1."""
        if any(state.structured_output is not None for state in self.scheduler.running):
            self._process_all()  # a grammar must have seen the last token
        ready = [state for state in self.scheduler.running if _can_decode(state)]
        if not ready:
            return 0
        batch_size = self.model_runner.padded_batch_size(len(ready))
        may_draft = self.config.speculate and not any(state.structured_output is not None for state in ready)
        all_greedy, query_len = _all_greedy(ready), 1
        if may_draft and self._speculation.should_draft(batch_size):
            query_len += self.config.speculate
        for state in list(ready):
            self._allocate_pages(state, query_len, ready)
        if not ready:
            return 0
        self._set_token_masks(ready)
        start = time.perf_counter()
        output, warmed_up = self.model_runner.decode([state.req_index for state in ready], query_len, all_greedy)
        self.stats.decode_steps += 1
        self.stats.drafted_tokens += (query_len - 1) * len(ready)
        no_prefill = all(state.prefilled for state in self.scheduler.running)
        timing = (batch_size, query_len > 1, start) if warmed_up and no_prefill else None
        self._enqueue(output, ready, query_len, timing)
        return 1

    def _allocate_pages(self, state: RequestState, query_len: int, ready: list[RequestState]) -> None:
        """Allocates the pages of the next ``query_len`` tokens of one of ``ready``. If none are left, the request that
        was admitted last is preempted, and is no longer ready; it may be this one.
        """
        while state in ready:
            begin = len(state.pages)
            # What is written behind the last possible token needs no page.
            longest = state.request.prompt_tokens + state.max_new_tokens
            pages = self.scheduler.allocate_pages(state, min(state.kv_length + query_len, longest))
            if pages is not None:
                if pages:
                    self.input_batch.set_pages(state.req_index, begin, pages)
                return
            if self._in_flight:  # a request may finish and free some
                self._process_all()
                ready[:] = [s for s in ready if _can_decode(s)]
            else:
                self.input_batch.remove_request(self.scheduler.running[-1].req_index)
                preempted = self.scheduler.preempt()
                self.stats.preemptions += 1
                if preempted in ready:
                    ready.remove(preempted)

    def _set_token_masks(self, states: list[RequestState]) -> None:
        """Copies what each grammar allows next to the device. A request whose grammar fails ends with this step."""
        for state in states:
            if state.structured_output is None:
                continue
            try:
                allowed = state.structured_output.allowed_tokens(state.output_token_ids)
            except UserError as error:
                state.error = str(error)
                continue
            self.input_batch.allowed_tokens[state.req_index].copy_(allowed, non_blocking=True)

    # Results of launched passes.

    def _enqueue(
        self, output: SamplerOutput, states: list[RequestState], query_len: int, timing: tuple[int, bool, float] | None
    ) -> None:
        for state in states:
            state.num_tokens_in_flight += query_len
            state.num_steps_in_flight += 1
        requested = [state.request.sampling_params.logprobs for state in states]
        num_logprobs = max((n for n in requested if n is not None), default=None)
        self._in_flight.append(AsyncOutput(output, states, query_len, num_logprobs, timing))

    def _process_all(self) -> None:
        while self._in_flight:
            self._process_oldest()

    def _process_oldest(self) -> None:
        """Reads and processes the tokens of the oldest pass in flight."""
        output = self._in_flight.popleft()
        token_ids, num_accepted, logprobs = output.get_output()
        total = 0
        for row, state in enumerate(output.states):
            state.num_tokens_in_flight -= output.query_len
            state.num_steps_in_flight -= 1
            if state.finished:
                continue
            count = num_accepted[row]
            total += count
            self.stats.accepted_tokens += count - 1
            own_logprobs = [] if logprobs is None else logprobs[row][:count]
            self.output_processor.process(state, token_ids[row][:count], own_logprobs)
        now = time.perf_counter()
        if output.timing:
            batch_size, drafted, start = output.timing
            self._speculation.record(batch_size, drafted, total, now - max(start, self._last_output_time))
        self._last_output_time = now

    def _update_stats(self) -> None:
        stats, scheduler = self.stats, self.scheduler
        stats.running, stats.waiting = len(scheduler.running), len(scheduler.waiting)
        stats.pages_used = scheduler.pool.num_used

    def check(self) -> None:
        """AssertionError unless batch indices and pages add up; for tests."""
        self.scheduler.check()

    def _set_kv_cache_scales(self) -> None:
        """Sets the scales of an fp8 cache by a prompt of a few hundred tokens."""
        text = " ".join(
            f"{n}. What do you see in the picture, and where is it? Think it over, then say." for n in range(24)
        )
        ids = self.processor.encode(Prompt(text)).input_ids[: self.model_config.context].to(self.model.device)
        positions = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
        attend = self.kv_cache.scale_setting_attention()
        self.model.decoder(self.model.decoder.embed_tokens(ids), positions, attend)


def _prefill_chunk(state: RequestState, begin: int, end: int) -> PrefillChunk:
    features = [
        image.slice_features(state.image_features[image.digest], begin, end)
        for image in state.request.images
        if image.overlaps(begin, end)
    ]
    token_ids = state.token_ids()[begin:end].clamp(min=0)
    return PrefillChunk(state.req_index, begin, token_ids, features, end == state.num_prefill_tokens)


def _can_decode(state: RequestState) -> bool:
    may_grow = len(state.output_token_ids) + state.num_steps_in_flight < state.max_new_tokens
    return not state.finished and state.prefilled and may_grow


def _all_greedy(states: Sequence[RequestState]) -> bool:
    """Whether all sample the largest logit, with no penalty and no token mask."""
    params = [state.request.sampling_params for state in states]
    unmasked = all(state.structured_output is None for state in states)
    return unmasked and all(p.temperature == 0 and p.repetition_penalty == 1 for p in params)
