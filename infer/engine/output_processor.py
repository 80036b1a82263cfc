"""Sampled tokens become text and events, and end their request where its answer is complete."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace

from infer.engine.config import EngineStats
from infer.engine.input_batch import InputBatch
from infer.engine.scheduler import RequestState, Scheduler
from infer.requests.outputs import Generation, StreamEvent, TokenLogprob
from phi4rv.errors import UserError
from phi4rv.processing.processor import Processor


class OutputProcessor:
    """Collects events until ``take_events``. ``stop_token_ids`` end an answer."""

    def __init__(
        self, scheduler: Scheduler, input_batch: InputBatch, stop_token_ids: set[int], stats: EngineStats
    ) -> None:
        self.scheduler, self.input_batch, self.stop_token_ids, self.stats = (
            scheduler,
            input_batch,
            stop_token_ids,
            stats,
        )
        self.events: list[StreamEvent] = []

    def take_events(self) -> list[StreamEvent]:
        events, self.events = self.events, []
        return events

    def process(self, state: RequestState, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """Appends new tokens to an answer, up to where it ends. ``logprobs``: theirs, or none."""
        if state.first_token_time is None:
            state.first_token_time = time.perf_counter()
        output, deltas, reason = state.output_token_ids, [], None
        begin = len(output)
        while reason is None and (count := len(output) - begin) < len(token_ids):
            token_id = token_ids[count]
            if token_id in self.stop_token_ids:
                reason = "stop"
                break
            complete = _advance_grammar(state, token_id)
            output.append(token_id)
            # One by one, so that the answer ends with the token that completes a stop string.
            deltas.append(state.detokenizer.push([token_id]))
            if complete or deltas[-1].stopped:
                reason = "stop"
            elif len(output) == state.max_new_tokens:
                reason = "length"
        new = output[begin:]
        self.stats.generated_tokens += len(new)
        num_top = state.request.sampling_params.logprobs
        kept = [] if num_top is None else [replace(p, top=p.top[:num_top]) for p in logprobs[: len(new)]]
        state.logprobs += kept
        thinking, text = "".join(d.thinking for d in deltas), "".join(d.text for d in deltas)
        event = StreamEvent(state.request_id, tuple(new), thinking, text, tuple(kept))
        reason = "error" if state.error else reason
        if reason:
            self.finish(state, reason, event)
        else:
            self.scheduler.cache_pages(state, state.num_tokens - 1)
            self.events.append(event)

    def finish(self, state: RequestState, reason: str, event: StreamEvent | None = None) -> None:
        """Ends a request and frees what it holds. Its last event is ``event``, with its Generation."""
        if state.req_index >= 0:
            if state.prefilled and state.output_token_ids:
                self.scheduler.cache_pages(state, state.num_tokens - 1)
            self.input_batch.remove_request(state.req_index)
        self.scheduler.remove(state)
        state.finished = True
        rest = state.detokenizer.finish()
        now, request = time.perf_counter(), state.request
        generation = Generation(
            prompt=request.prompt,
            prompt_tokens=request.prompt_tokens,
            image_tokens=request.image_tokens,
            token_ids=state.output_token_ids,
            logprobs=state.logprobs,
            thinking=state.detokenizer.thinking,
            text=state.detokenizer.text,
            finish_reason=reason,
            error=state.error,
            cached_tokens=state.cached_tokens,
            queue_seconds=(state.scheduled_time or now) - state.arrival_time,
            first_token_seconds=(state.first_token_time or now) - state.arrival_time,
            total_seconds=now - state.arrival_time,
        )
        event = event or StreamEvent(state.request_id)
        thinking, text = event.thinking + rest.thinking, event.text + rest.text
        self.events.append(replace(event, thinking=thinking, text=text, generation=generation))
        self.stats.finished[reason] += 1


def _advance_grammar(state: RequestState, token_id: int) -> bool:
    """Advances a request's grammar, if it has one, by its next token. Returns whether the answer is complete."""
    if state.structured_output is None:
        return False
    try:
        return state.structured_output.accept_token(state.output_token_ids, token_id)
    except UserError as error:
        state.error = state.error or str(error)
        return False


def stop_token_ids(processor: Processor) -> set[int]:
    """End-of-text ids: the config's, and those of generation_config.json."""
    listed = json.loads(processor.files.get("generation_config.json", b"{}")).get("eos_token_id", [])
    return {processor.config.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
