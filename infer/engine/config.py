"""An engine's limits and features, and the totals that it counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from phi4rv.errors import UserError

CACHE_DTYPES = (None, "fp8")


@dataclass(frozen=True)
class EngineConfig:
    """Limits and features of an engine.

    max_running: requests that decode at once. cache_tokens: tokens that the paged KV cache holds, at least the model's
    context window; None: by memory. chunk_tokens: prompt tokens of a prefill pass while others decode. cache_dtype:
    None (the model's) or ``fp8``. speculate: tokens drafted by prompt lookup, 0: none. graphs: CUDA graphs of decode
    steps; overlap: reading a step's tokens while the next one runs; None: where there is a GPU whose kernels allow it.
    """

    max_running: int = 64
    cache_tokens: int | None = None
    page_size: int = 64
    chunk_tokens: int = 2048
    cache_dtype: str | None = None
    image_cache_bytes: int = 1 << 30
    prefix_cache: bool = True
    speculate: int = 4
    graphs: bool | None = None
    overlap: bool | None = None

    def __post_init__(self) -> None:
        for name, fits, right in (
            ("max_running", self.max_running >= 1, "1 or more"),
            ("cache_tokens", self.cache_tokens is None or self.cache_tokens >= 1, "1 or more"),
            ("page_size", self.page_size in (16, 32, 64, 128, 256), "16, 32, 64, 128 or 256"),
            ("chunk_tokens", self.chunk_tokens >= 1, "1 or more"),
            ("cache_dtype", self.cache_dtype in CACHE_DTYPES, "fp8, or not given"),
            ("image_cache_bytes", self.image_cache_bytes >= 0, "0 or more"),
            ("speculate", 0 <= self.speculate <= 7, "0 to 7"),
        ):
            if not fits:
                raise UserError(f"--{name.replace('_', '-')}: {getattr(self, name)} must be {right}")


@dataclass
class EngineStats:
    """Totals since the start; the last four are current values."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    image_tokens: int = 0
    image_cache_hits: int = 0
    image_cache_misses: int = 0
    preemptions: int = 0
    decode_steps: int = 0
    prefill_passes: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
