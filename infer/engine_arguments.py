"""The options that every command with an engine has: which model, and what the engine may use."""

from __future__ import annotations

import argparse

from infer.engine.config import CACHE_DTYPES, EngineConfig
from infer.quantization.weight_loader import load
from phi4rv.adapters.peft import merge_adapter
from phi4rv.command_line import usable_device
from phi4rv.config import DTYPES
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.ops.registry import KERNELS
from phi4rv.processing.processor import Processor


def model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a folder in the published layout, or a quantised one")
    add("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's layout, merged into the weights as they are loaded")
    add("--weights", metavar="FORMATS", help="int8, fp8, int4, …: quantise as they are loaded (see infer.quantize)")
    add("--dtype", choices=DTYPES, help="the checkpoint's unless given")
    add("--device", help="cuda where there is one, else cpu")
    add("--kernels", metavar="KIND", help=f"one of {', '.join(KERNELS)}; exceptions behind it: triton,adamw=torch")


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


def engine_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``EngineConfig``, which every command with an engine has."""
    default = EngineConfig()
    add = parser.add_argument
    add("--max-running", type=int, default=default.max_running, metavar="N", help="requests that decode at once")
    add("--cache-tokens", type=int, metavar="N", help="tokens that the paged cache holds; by memory unless given")
    add("--cache-dtype", choices=[d for d in CACHE_DTYPES if d], help="keys and values; the model's unless given")
    add("--chunk-tokens", type=int, default=default.chunk_tokens, metavar="N", help="of prompts between decode steps")
    add(
        "--speculate", type=int, default=default.speculate, metavar="N", help="tokens drafted by prompt lookup, 0: none"
    )


def engine_config_of(args: argparse.Namespace) -> EngineConfig:
    names = ("max_running", "cache_tokens", "cache_dtype", "chunk_tokens", "speculate")
    return EngineConfig(**{name: getattr(args, name) for name in names})
