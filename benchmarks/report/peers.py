"""The peers that our figures are compared with: versions and settings."""

from __future__ import annotations

import importlib.metadata

import torch

STATIC = "default mode, each exact shape by itself"
SDPA = "torch.nn.functional.scaled_dot_product_attention"
# As benchmarks name them. Distributions, the first that is installed; settings.
PEERS: dict[str, tuple[tuple[str, ...], str]] = {
    "torch": (("torch",), "PyTorch's own functions, eager"),
    "torch.compile": (("torch",), f"torch.compile of the definition, {STATIC}; patch_embed with its graph break"),
    "torch bf16": (("torch",), "the product in bfloat16, eager"),
    "torch int8": (("torch",), "torch._weight_int8pack_mm"),
    "torch int4": (("torch",), "torch._weight_int4pack_mm (tinygemm), groups of 128, 8 inner k-tiles"),
    "torch fp8 x fp8": (("torch",), "torch._scaled_mm by rows, both operands in fp8; rounding x is not timed"),
    "torch fused": (("torch",), "torch._fused_adamw_, what AdamW(fused=True) calls"),
    "torch chunked": (("torch",), "torch.nn.functional.linear_cross_entropy, its default options"),
    "torch flash": (
        ("torch",),
        f"packed: torch.nn.attention.varlen.varlen_attn; decoding: {SDPA} with FLASH_ATTENTION alone",
    ),
    "torch flash, gathered": (("torch",), "varlen_attn on keys and values packed first, which is timed"),
    "packed_attention, gathered": (("triton",), "this project's kernel without pages, on keys and values packed first"),
    "cudnn": (
        ("torch",),
        f"{SDPA} with CUDNN_ATTENTION alone; documents of one length as a batch, others as a nested tensor",
    ),
    "flex": (
        ("torch",),
        "torch.compile of flex_attention, default mode and tiles; packed: with a block mask made once",
    ),
    "cublas products": (("torch",), "torch.nn.functional.linear twice: no bias, no GELU, nothing moved"),
    "cublas bf16 products": (("torch",), "torch.nn.functional.linear twice, on the weights before rounding"),
    "cublas fp8 products": (("torch",), "cast and torch._scaled_mm by rows, twice; no scales found, no bias, no GELU"),
    "triton": (("triton",), "this project's Triton kernel, tiles of triton_kernels/tuned.json"),
    "liger": (("liger-kernel",), "its functions as they come"),
    "bitsandbytes": (("bitsandbytes",), "optimizer_update_8bit_blockwise"),
    "flash-attn 2": (("flash-attn",), "flash_attn_varlen_func, not deterministic; flash_attn_with_kvcache"),
    "flash-attn 3": (("flash-attn-3", "flash_attn_3"), "as version 2, of flash_attn_interface"),
    "flash-attn 4": (("flash-attn-4", "flash-attn"), "flash_attn.cute: flash_attn_varlen_func, flash_attn_func"),
    "transformers": (
        ("transformers",),
        "Siglip2VisionModel and Phi3ForCausalLM with SDPA; its Pillow processor",
    ),
    "transformers, flash-attn": (("transformers",), "the same with flash_attention_2"),
    "transformers, compiled": (("transformers",), "the same, every layer by torch.compile, lengths dynamic"),
    "transformers + Liger": (("liger-kernel",), "the same after apply_liger_kernel_to_phi3, its defaults"),
    "transformers, static cache": (
        ("transformers",),
        "generate with cache_implementation static, for which it compiles",
    ),
    "vLLM": (("vllm",), "LLM, bfloat16, no prefix caching, CUDA graphs as it chooses; the decoder alone"),
    "torch.save": (("torch",), "in the loop, without waiting for the disk"),
    "dcp.save": (("torch",), "torch.distributed.checkpoint.save in the loop, of one process"),
}


def peer_versions() -> dict[str, dict[str, str]]:
    """Of each peer its version, or ``not installed``, and its settings."""
    return {name: {"version": _version(found), "settings": settings} for name, (found, settings) in PEERS.items()}


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _version(distributions: tuple[str, ...]) -> str:
    if distributions == ("torch",):
        return torch.__version__
    installed = ((name, version(name)) for name in distributions)
    return next((f"{name} {v}" for name, v in installed if v != "not installed"), "not installed")
