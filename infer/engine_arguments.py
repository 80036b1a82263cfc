"""The options that every command with an engine has: which model, and what the engine may use."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from infer.engine.config import CACHE_DTYPES, EngineConfig
from infer.quantization.weight_loader import load
from phi4rv.adapters.peft import merge_adapter
from phi4rv.command_line import ADAPTER, CHECKPOINT, MOST, WEIGHTS, Number, OneOf, device_options, usable_device
from phi4rv.config import DTYPES
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.processing.processor import Processor


def model_options(add: Callable[..., None]) -> None:
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help=f"{CHECKPOINT}; in the Hugging Face layout, or as infer.quantize writes it",
    )
    add("--adapter", metavar="DIR", help=ADAPTER, unset="none")
    add("--weights", metavar="FORMATS", help=f"{WEIGHTS}; as they are read", unset="as the checkpoint has them")
    device_options(add, "of all weights that are not quantised", "the checkpoint's")


def load_model(args: argparse.Namespace) -> tuple[Phi4RV, Processor]:
    """The model that ``model_options`` name."""
    if args.adapter and args.weights:
        raise UserError("--adapter: cannot be merged into --weights; merge it first with python -m phi4rv.merge")
    device = usable_device(args.device) if args.device else None
    dtype = DTYPES[args.dtype] if args.dtype else None
    model, processor = load(args.checkpoint, device, dtype, args.kernels, args.weights)
    if args.adapter:
        merge_adapter(model, args.adapter)
    return model, processor


def engine_options(add: Callable[..., None]) -> None:
    """The options of ``EngineConfig``, which every command with an engine has."""
    default = EngineConfig()
    add(
        "--max-running",
        kind=Number(int, 1, MOST),
        default=default.max_running,
        help="requests that decode at once, at most",
    )
    add(
        "--cache-tokens",
        kind=Number(int, 1, MOST),
        help="tokens that the paged key-value cache holds, at least the model's window",
        unset="by the memory that is free",
    )
    add(
        "--cache-dtype",
        kind=OneOf(tuple(d for d in CACHE_DTYPES if d)),
        help="type of the cache's keys and values",
        unset="the model's",
    )
    add(
        "--chunk-tokens",
        kind=Number(int, 1, MOST),
        default=default.chunk_tokens,
        help="prompt tokens of a prefill pass while others decode",
    )
    add(
        "--speculate",
        kind=Number(int, 0, 7),
        default=default.speculate,
        help="tokens drafted by prompt lookup and checked in one decode step; 0: none",
    )


def engine_config_of(args: argparse.Namespace) -> EngineConfig:
    names = ("max_running", "cache_tokens", "cache_dtype", "chunk_tokens", "speculate")
    return EngineConfig(**{name: getattr(args, name) for name in names})
