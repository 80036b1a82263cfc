"""A plan as the table that people read."""

from __future__ import annotations

from typing import Any

from train.planning.duration import LINK_EFFICIENCY

GIGA = 1e9
CARD_SIZES = (80, 48)  # GB, of the cards that one-GPU settings are held to


def format_plan(plan: dict[str, Any]) -> str:
    parts = [_header(plan), _memory(plan)]
    parts += [_one_gpu(plan)] if plan["gpus"] == 1 else []
    return "\n\n".join([*parts, _step(plan), _report(plan)])


def _header(plan: dict[str, Any]) -> str:
    gpu, sample = plan["gpu_stated"], plan["sample"]
    shares = ", ".join(f"{n.replace('_', ' ')} {s['value']:.3g} ({s['from']})" for n, s in plan["shares"].items())
    return "\n".join(
        [
            f"stage {plan['stage']} on {plan['gpus']} {plan['gpu']}: {plan['parameters']:,} parameters, "
            f"{plan['trained']:,} trained",
            f"a GPU as stated: {gpu['tflops']:,g} TFLOP/s, {gpu['memory']:g} GB, {gpu['bandwidth']:,.0f} GB/s; to "
            f"others {gpu['nvlink']:g} GB/s in a node of {gpu['node']}, {gpu['network']:g} GB/s outside, of which "
            f"{LINK_EFFICIENCY:.0%} are assumed reached",
            f"rows of {plan['sequence_length']:,} tokens, {plan['global_batch']:,} samples a step, "
            f"{sample['tokens']:,.0f} tokens a sample (the report's), {sample['patches']:,.0f} of them patches",
            shares,
        ]
    )


def _memory(plan: dict[str, Any]) -> str:
    rows = plan["settings"]
    kinds = list(rows[0]["memory"])
    width = max(len(row["options"]) for row in rows)
    heads = "".join(f"{kind:>12}" for kind in [*kinds, "total", "s/batch"])
    lines = ["memory of a GPU, GB (10⁹ bytes)", f"{'':{width}}{heads}  fits"]
    for row in rows:
        cells = [f"{row['memory'][kind] / GIGA:.1f}" for kind in kinds]
        cells += [f"{row['total'] / GIGA:.1f}", f"{row['step_seconds']:.2f}"]
        cells_text = "".join(f"{cell:>12}" for cell in cells)
        lines.append(f"{row['options']:{width}}{cells_text}  {'yes' if row['fits'] else 'no'}")
    memory = plan["gpu_stated"]["memory"]
    first = plan["first_fit"]
    lines.append(f"the first that fits {memory:g} GB: {first}" if first else f"nothing here fits {memory:g} GB")
    if plan["equal_shares"]:
        lines.append(f"with {plan['equal_shares']}: without it, ranks get unequal work in many steps")
    return "\n".join(lines)


def _one_gpu(plan: dict[str, Any]) -> str:
    """For each way to train, the first --checkpointing with which it fits a card."""
    ways: dict[str, list[dict[str, Any]]] = {}
    for row in plan["settings"]:
        ways.setdefault(row["options"].split(" --checkpointing")[0], []).append(row)
    width = max(map(len, ways))
    lines = ["on one GPU of" + " " * max(0, width - 13) + "".join(f"{f'{size} GB':>26}" for size in CARD_SIZES)]
    for way, rows in ways.items():
        cells = []
        for size in CARD_SIZES:
            fit = next((row for row in rows if row["total"] <= size * GIGA), None)
            kind = fit and fit["setting"]["checkpointing"]
            cells.append(f"{f'--checkpointing {kind}' if fit else 'no':>26}")
        lines.append(f"{way:{width}}" + "".join(cells))
    return "\n".join(lines)


def _step(plan: dict[str, Any]) -> str:
    c = plan["chosen"]
    lines = [f"a global batch with {c['options']}"]
    lines.append(f"{c['rows_per_gpu']:.2f} rows a GPU, in {c['micro_steps']} micro-batches")
    if c["sent"]:
        sent = ", ".join(f"{name} {size / GIGA:.1f} GB" for name, size in c["sent"].items())
        lines.append(
            f"sent by a GPU: {sent}; {c['to_own_node'] / GIGA:.1f} GB inside its node, "
            f"{c['to_other_nodes'] / GIGA:.1f} GB to others: {c['link_seconds']:.2f} s"
        )
    lines.append(
        f"products {c['compute_seconds']:.2f} s, update {c['update_seconds']:.2f} s; {c['step_seconds']:.2f} s with "
        f"communication overlapped; {c['tokens_per_second']:,.0f} tokens/s, "
        f"{c['useful_tflops']:.0f} useful TFLOP/s a GPU"
    )
    lines.append(f"{c['steps']:,.0f} batches: {c['days']:.2f} days; {c['days_nothing_hidden']:.2f} without overlap")
    days = ", ".join(f"{100 * share:.3g} %: {d:.2f}" for share, d in c["days_by_efficiency"].items())
    lines.append(f"days by efficiency: {days}")
    return "\n".join(lines)


def _report(plan: dict[str, Any]) -> str:
    r = plan["report"]
    return (
        f"the report's run: {r['tokens'] / GIGA:.1f} B tokens on {r['gpus']} B200 in {r['days']:g} days\n"
        f"by 6 operations a parameter and token {r['tflops_6pd']:.0f} TFLOP/s a GPU, {r['share_6pd']:.1%} of the "
        f"stated peak; by the useful products, with the shares above, {r['tflops_useful']:.0f}, "
        f"{r['share_useful']:.1%}\n"
        f"this plan at {r['share_useful']:.1%}, three stages, --shard optimizer --checkpointing none: "
        f"{r['days_planned']:.2f} days"
    )
