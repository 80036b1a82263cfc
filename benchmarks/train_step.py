"""A training step of the full-width model: ``python -m benchmarks.train_step [--json FILE] …``.

5120 wide decoder with as many layers as fit, the whole tower (1152 wide), the whole vocabulary; ROWS packed rows of
8192 random tokens, forward and backward, clipping, AdamW; nothing is recomputed. The documents have the lengths of
``data/mixture.py``, once with its images, and once with text in the images' places. With few layers the tower
and the optimizer take a larger share of the time than in the whole model.

Beside each other, at the same number of layers and on the same rows: our kernels in CUDA and in Triton, Triton's with
``--linear fp8``, the plain PyTorch that defines them (``--kernels torch``), and transformers' classes with SDPA, with
flash-attn, with Liger-Kernel and compiled (``benchmarks/training/contenders.py`` says how). Each in a process of its
own, which may fail or hang without harm.

- tokens/s: of the whole step. MFU: useful operations (``train.data.flops``) a second over the product rate measured
  in the same run (``kernels/timing.py``), not over the maker's figure.
- goals: MFU of MFU_GOALS, and RATIO_GOAL times the tokens/s of the fastest of transformers; in fp8, FP8_GOAL times
  ours in bfloat16. Only contenders count whose losses are those of the definitions.

On a CPU a tiny model shows that everything runs; its times say nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.jobs import run_in_process
from benchmarks.kernels import timing
from benchmarks.options import json_option, layers_option, seconds_option
from benchmarks.report.result_files import write_results
from benchmarks.report.rows import Row
from benchmarks.training.batches import CASES, TOKENS, count_work, make_batches
from benchmarks.training.contenders import Phi4RVTrainer, TransformersTrainer
from phi4rv.batch import PackedBatch
from phi4rv.command_line import Parser, exit_status
from phi4rv.config import Config, VisionConfig
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.ops import cuda
from phi4rv.ops.registry import Operations
from train.figures.metrics import peak_memory, throughput

Record = dict[str, Any]

ROWS = 8
MFU_GOALS, RATIO_GOAL, FP8_GOAL = {"text": 0.55, "images": 0.50}, 1.5, 1.3
REFERENCE, OURS, FP8, LIGER = "torch", ("cuda", "triton"), "triton, fp8", "transformers + Liger"
PEERS = ("transformers", LIGER, "transformers, flash-attn", "transformers, compiled")
# In this order: without the definitions' losses none of ours counts.
CONTENDERS = ("cuda", REFERENCE, LIGER, "triton", "transformers", FP8, *PEERS[2:])
REQUIRED_PACKAGES = {
    "transformers": ("transformers", "transformers"),
    "Liger": ("liger_kernel", "Liger-Kernel"),
    "flash-attn": ("flash_attn", "flash-attn"),
}
LOSS_TOLERANCE = (
    0.005  # by how much a contender's losses may differ from the definitions', which start from the same weights
)
WARMUP_STEPS, TIMED_STEPS = 1, 3
MEMORY_FRACTION = 0.92  # of the device's memory; the rest is the context's, fragments and what is not counted
TINY = Config(96, 64, 80, 2, 4, 2, vision=VisionConfig(48, 64, 3, 2, num_patches=16))
TINY_TOKENS, TINY_ROWS = 128, 2


def count_bytes(config: Config, layers: int, tokens: int, patches: int) -> int:
    """Of a step of the contender that needs most, transformers with SDPA: counted, not measured.

    20 bytes of each parameter: weight and gradient in bfloat16, master, two moments and the gradient again in
    float32. Of each token and decoder layer what is kept for the backward pass, mostly 2 bytes, in norms 4: 40 C + 8 I;
    of each patch and tower layer 20 c + 4 i (notation of ``train.data.flops``). 12 bytes of each logit, of every token.
    """
    v = config.vision
    with torch.device("meta"):
        model = Phi4RV(dataclasses.replace(config, num_hidden_layers=layers), Operations("torch"))
    parameters = sum(p.numel() for p in model.parameters())
    kept = tokens * layers * (40 * config.hidden_size + 8 * config.intermediate_size)
    seen = patches * v.num_hidden_layers * (20 * v.hidden_size + 4 * v.intermediate_size)
    return 20 * parameters + kept + seen + 12 * tokens * config.vocab_size


def layers_that_fit(config: Config, memory: int, tokens: int, patches: int) -> int:
    """Decoder layers, from 1 to the model's own, whose step takes at most FULL of ``memory`` bytes."""
    one, two = (count_bytes(config, n, tokens, patches) for n in (1, 2))
    return max(1, min(1 + int((MEMORY_FRACTION * memory - one) // (two - one)), config.num_hidden_layers))


def unavailable_reason(contender: str, device: torch.device) -> str | None:
    """Why a contender cannot run here."""
    for part, (module, name) in REQUIRED_PACKAGES.items():
        if part in contender and importlib.util.find_spec(module) is None:
            return f"{name} is not installed"
    if contender == "cuda":
        return cuda.unavailable_reason(device) if device.type == "cuda" else "not on a CPU"
    only_on_gpus = ("triton", FP8, "transformers, flash-attn", "transformers, compiled")
    return "not on a CPU" if contender in only_on_gpus and device.type != "cuda" else None


def measure(
    contender: str, config: Config, device_name: str, tokens: int, rows: int, product: float
) -> dict[str, Record]:
    """Of each of CASES the record of one contender. ``product``: FLOP/s that count as all."""
    device = torch.device(device_name)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    model: Phi4RVTrainer | TransformersTrainer
    if contender in PEERS:
        model = TransformersTrainer(config, device, dtype, contender.partition("transformers")[2].strip(" ,+"))
    else:
        model = Phi4RVTrainer(config, contender.split(",")[0], device, dtype, float8=contender == FP8)
    found = {}
    for case in CASES:
        given = [row.to(device) for row in make_batches(case, config, tokens, rows)]
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        taken = [_timed(model, given, on_gpu) for _ in range(WARMUP_STEPS + TIMED_STEPS if on_gpu else 2)]
        if not all(math.isfinite(loss) for _, loss in taken):
            raise ValueError(f"the losses of {case} are {[loss for _, loss in taken]}")
        times = [t for t, _ in taken][WARMUP_STEPS if on_gpu else 1 :]
        seconds = statistics.median(times)
        rates = throughput(count_work(config, given), seconds, 1, product / 1e12)
        found[case] = {**rates, "memory": peak_memory(device), "losses": [loss for _, loss in taken]}
        found[case]["spread"] = timing.relative_iqr(times)
    return found


def _timed(model: Phi4RVTrainer | TransformersTrainer, rows: list[PackedBatch], on_gpu: bool) -> tuple[float, float]:
    """Seconds and loss of a step. Reading the loss waits for the rows, the synchronisation for the update."""
    begun = time.perf_counter()
    loss = model.step(rows)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begun, loss


def device_rates(device: str) -> Record:
    """Measured product rate, and memory."""
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
    return {"product": timing.ceilings(device)["product"], "memory": memory}


def run(
    seconds: float = math.inf, layers: int = 0, on_result: Callable[[Record], None] = lambda result: None
) -> Record:
    """All contenders, one after another, within ``seconds``. ``on_result`` gets the result so far after each."""
    device, deadline = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic() + min(seconds, 1e6)
    config, tokens, rows = (Config(), TOKENS, ROWS) if device == "cuda" else (TINY, TINY_TOKENS, TINY_ROWS)
    about, reason = run_in_process(device_rates, (device,), deadline - time.monotonic())
    if about is None:
        raise RuntimeError(f"the device's product rate: {reason}")
    if device == "cuda":
        patches = max(len(row.patches) for row in make_batches("images", config, tokens, rows))
        layers = layers or layers_that_fit(config, about["memory"], tokens, patches)
        config = dataclasses.replace(config, num_hidden_layers=layers)
    result: Record = {"device": device, "layers": config.num_hidden_layers, "rows": rows, "tokens": tokens, **about}
    result["sides"] = {contender: {"reason": "out of time"} for contender in CONTENDERS}
    for number, contender in enumerate(CONTENDERS):
        left = deadline - time.monotonic()
        reason = unavailable_reason(contender, torch.device(device)) or (None if left > 0 else "out of time")
        if reason is None:  # none may take all the time that is left, but the last
            limit = min(left, 2 * left / (len(CONTENDERS) - number))
            found, reason = run_in_process(measure, (contender, config, device, tokens, rows, about["product"]), limit)
        result["sides"][contender] = {"reason": reason} if reason else found
        on_result(result)
    return result


def losses_match(record: Record, definitions: Record | None) -> bool:
    """Whether a contender learned as the definitions did, on the same rows from the same weights."""
    if definitions is None:
        return False
    pairs = zip(record["losses"], definitions["losses"], strict=True)
    return all(abs(a - b) <= LOSS_TOLERANCE * abs(b) for a, b in pairs)


def fastest(result: Record, case: str) -> dict[str, tuple[str, Record] | None]:
    """Side and record of the fastest of our kernels, of ``peer``s and in ``fp8``. Of ours only those count whose losses
    are those of the definitions.
    """
    found = {contender: record[case] for contender, record in result["sides"].items() if case in record}
    right = {contender: r for contender, r in found.items() if losses_match(r, found.get(REFERENCE))}
    return {
        name: max(
            ((contender, r) for contender, r in among.items() if contender in contenders),
            key=lambda pair: pair[1]["tokens_per_second"],
            default=None,
        )
        for name, among, contenders in (("ours", right, OURS), ("peer", found, PEERS), ("fp8", right, (FP8,)))
    }


def goals(result: Record) -> list[Record]:
    """Of each case what the fastest of our kernels reached, and whether it is enough."""
    judged = []
    for case in CASES:
        best = fastest(result, case)
        ours, peer, fp8 = (pair and pair[1]["tokens_per_second"] for pair in best.values())
        for name, value, goal in (
            ("MFU", best["ours"] and best["ours"][1]["mfu"], MFU_GOALS[case]),
            ("over transformers", ours and peer and ours / peer, RATIO_GOAL),
            ("fp8 over bfloat16", ours and fp8 and fp8 / ours, FP8_GOAL),
        ):
            known = result["device"] == "cuda" and value is not None
            verdict = ("met" if value >= goal else "missed") if known else "not measured"
            judged.append({"case": case, "name": name, "goal": goal, "value": value, "verdict": verdict})
    return judged


def table_rows(result: Record) -> list[Row]:
    """Of each case tokens/s beside the fastest of transformers, MFU, and tokens/s in fp8 beside ours in bfloat16."""
    judged = {(goal["case"], goal["name"]): goal for goal in goals(result)}
    found = []
    for case in CASES:
        best = fastest(result, case)
        what = f"{case}, {result['layers']} decoder layers"
        for name, ours, peer, added, unit, scale in (
            ("over transformers", best["ours"], best["peer"], "", "tokens/s", 1),
            ("fp8 over bfloat16", best["fp8"], best["ours"], ", fp8", "tokens/s", 1),
            ("MFU", best["ours"], None, ", MFU", "%", 100),
        ):
            goal, key = judged[case, name], "mfu" if name == "MFU" else "tokens_per_second"
            bound = {"share": ours[1]["mfu"], "ceiling": "product"} if ours and name == "over transformers" else {}
            found.append(
                Row(
                    "train_step", what + added, scale * ours[1][key] if ours else None, unit, lower_is_better=False,
                    peer=peer[0] if peer else None, peer_value=peer[1][key] if peer else None, **bound,
                    goal=f"{goal['goal']:.0%}" if name == "MFU" else f"{goal['goal']:g}x", verdict=goal["verdict"],
                    noise=ours[1].get("spread") if ours else None, reason=None if ours else _missing_reason(result),
                    tiny=result["device"] == "cpu", headline=True,
                )
            )  # fmt: skip
    return found


def _missing_reason(result: Record) -> str:
    reasons = [
        f"{contender}: {r['reason']}" for contender, r in result["sides"].items() if contender in OURS and "reason" in r
    ]
    return "; ".join(reasons) or "its losses are not those of the definitions"


def table(result: Record) -> str:
    lines = ["On a CPU, tiny: what counts is that everything runs."] if result["device"] == "cpu" else []
    lines.append(
        f"{result['layers']} decoder layers, {result['rows']} rows of {result['tokens']} tokens a step; "
        f"product rate {result['product'] / 1e12:.3g} TFLOP/s"
    )
    for contender, record in result["sides"].items():
        if "reason" in record:
            lines.append(f"  {contender:24} {record['reason']}")
        for case in (case for case in CASES if case in record):
            r = record[case]
            lines.append(
                f"  {contender:24} {case:7} {r['tokens_per_second']:9,.0f} tokens/s {r['mfu']:7.1%} MFU "
                f"{r['memory'] / 2**30:6.1f} GiB  loss {r['losses'][0]:.3f} to {r['losses'][-1]:.3f}"
            )
    for goal in goals(result):
        value = "-" if goal["value"] is None else f"{goal['value']:.2f}"
        lines.append(f"goal, {goal['case']}: {goal['name']} {goal['goal']:g}, is {value}: {goal['verdict']}")
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser("benchmarks.train_step", "Times a training step, beside its peers.")
    json_option(parser.add)
    seconds_option(parser.add, "what does not fit in it is left out")
    layers_option(parser.add, default=0)
    return parser


def command(args: argparse.Namespace) -> None:
    def on_result(result: Record) -> None:
        if args.json:
            write_results(args.json, {"train_step": {**result, "goals": goals(result)}})

    print(table(run(args.seconds, args.layers, on_result)))


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: command(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
