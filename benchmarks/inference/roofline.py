"""Roofline of inference: the bytes it has to read and the FLOPs it has to do, counted from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phi4rv.config import Config
from phi4rv.ops.low_precision import GROUP_SIZE
from train.data.flops import flops

Record = dict[str, Any]

WEIGHTS = ("bf16", "fp8", "int8", "int4")
# Of the output layer beside decoder layers in each format: int4 would cost it too much.
HEAD_FORMAT = {"bf16": "bf16", "fp8": "fp8", "int8": "int8", "int4": "bf16"}


@dataclass(frozen=True)
class Shapes:
    """context: tokens that a decode step attends to, in the mean of the ``new`` steps timed. text: tokens of a question
    beside its image, which has as many patches as the configuration allows. many: requests at once, each of ``prompt``
    tokens and ``answer`` new ones.
    """

    context: int
    new: int
    text: int
    many: int
    prompt: int
    answer: int


FULL = Shapes(context=4096, new=256, text=256, many=64, prompt=512, answer=256)
TINY = Shapes(context=128, new=16, text=64, many=4, prompt=64, answer=8)


def matrix_bytes(rows: int, columns: int, form: str) -> int:
    """Of a weight (rows, columns) with its scales; the formats of ``phi4rv.ops.low_precision``."""
    if form == "bf16":
        return 2 * rows * columns
    if form == "int4":
        return rows * -(-columns // GROUP_SIZE) * (GROUP_SIZE // 2 + 2)
    return rows * columns + 4 * rows


def weight_bytes(config: Config, form: str) -> int:
    """That a decode step reads whatever the context: layers, norms and output layer, and one row of the embeddings.
    The layers are in ``form``, the output layer in HEAD's, the rest in 16 bits.
    """
    hidden, wide = config.hidden_size, config.intermediate_size
    heads, groups = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    matrices = ((heads + 2 * groups, hidden), (hidden, heads), (2 * wide, hidden), (hidden, wide))
    layer = sum(matrix_bytes(*shape, form) for shape in matrices) + 2 * 2 * hidden
    head = matrix_bytes(config.vocab_size, hidden, HEAD_FORMAT[form])
    return config.num_hidden_layers * layer + head + 2 * 2 * hidden


def cache_bytes(config: Config, tokens: int) -> int:
    """Keys and values of so many tokens in 16 bits."""
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens


def step_bytes(config: Config, form: str, context: int) -> int:
    """That one decode step must read."""
    return weight_bytes(config, form) + cache_bytes(config, context)


def prefill_operations(config: Config, tokens: int, patches: int = 0) -> int:
    """Of one prompt, up to the logits of its last token."""
    return flops(config, [tokens], [patches] if patches else [], 1, ()).forward


def part_formats(form: str) -> dict[str, str]:
    """The parts of the model that are in another format than 16 bits (``phi4rv.quantization.quantized_linear``)."""
    return {part: f for part, f in (("decoder", form), ("head", HEAD_FORMAT[form])) if f != "bf16"}


def weight_format(contender: str) -> str:
    """``cuda, fp8`` -> fp8."""
    _, _, form = contender.partition(", ")
    return form if form in WEIGHTS else "bf16"


def with_rates(
    contender: str, cases: dict[str, Record], config: Config, shapes: Shapes, ceilings: Record
) -> dict[str, Record]:  # fmt: skip
    """The times of a contender's cases with what they are as rates, and as shares of the measured ``ceilings``."""
    return {case: {**r, **_rates(case, r, contender, config, shapes, ceilings)} for case, r in cases.items()}


def _rates(case: str, r: Record, contender: str, config: Config, shapes: Shapes, ceilings: Record) -> Record:
    if "reason" in r:
        return {}
    if case == "decode":
        rate = step_bytes(config, weight_format(contender), shapes.context) / r["seconds"]
        return {"tokens_per_second": 1 / r["seconds"], "bytes_per_second": rate, "share": rate / ceilings["copy"]}
    if case == "first token":
        rate = prefill_operations(config, r["patches"] + shapes.text, r["patches"]) / r["seconds"]
        return {"operations_per_second": rate, "share": rate / ceilings["product"]}
    if case == "second question":
        return {"ratio": r["first_seconds"] / r["seconds"]}
    if case == "at once":
        return {"ratio": r["tokens_per_second"] / r["one"]}
    if case == "load":
        rate = r["bytes"] / r["seconds"]
        return {"bytes_per_second": rate, "share": rate / ceilings["upload"]}
    return {}
