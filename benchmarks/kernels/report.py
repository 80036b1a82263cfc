"""The kernels' records as text for a terminal and as a chart."""

from __future__ import annotations

import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.report.rows import Row

Record = dict[str, Any]

WIDTH, SHAPE = 138, 50
STATUS = {"failed": "failed", "wrong": "wrong", "not measured": "not run"}
CPU = (
    "On a CPU, interpreted or emulated at tiny shapes: what counts is that everything runs; the times say nothing,\n"
    "and torch.compile compiles nothing."
)
LEGEND = (
    "ms: median of interleaved rounds over inputs larger than the L2; ±%: half of the rounds lie within this width",
    "MiB: most memory above the inputs, a backward pass with its forward; ceiling: share of the copy bandwidth or the",
    "product rate, whichever binds; goal: of the best peer's time over ours, or of a share; peers: time over ours",
)


def table_rows(result: dict[str, Any]) -> list[Row]:
    """Each case beside the peer that its goal names, else the fastest. ``headline``: of every operation, direction and
    kind of kernel the first case with a goal.
    """
    seen: set[tuple[Any, ...]] = set()
    found = []
    for r in by_operation(result):
        kind = r["operation"], r["backward"], r["shape"].endswith(", CUDA")
        named = r["goal"][0] if r["goal"] else None
        peer = named if "ms" in r["peers"].get(named, {}) else r["best_peer"]
        found.append(
            Row(
                "kernels", f"{r['operation']}: {r['shape']}" if r["shape"] else r["operation"], r["ms"], "ms",
                peer=peer, peer_value=r["peers"][peer]["ms"] if peer else None, share=r["share"], ceiling=r["ceiling"],
                goal=_goal(r["goal"]), verdict=r["verdict"], noise=r.get("spread"),
                reason=None if r["status"] == "ok" else f"{r['status']}: {r['reason']}",
                tiny=result["device"] == "cpu", headline=bool(r["goal"]) and kind not in seen,
            )
        )  # fmt: skip
        if r["goal"]:
            seen.add(kind)
    return found


def _goal(goal: Any) -> str | None:
    if goal is None:
        return None
    against, number = goal
    if against in ("copy", "product"):
        return f"{number:.0%} of {against}"
    return f"{number:g}x" if against == "peer" else f"{number:g}x {against}"


def table(result: dict[str, Any]) -> str:
    """Under each operation its rows with their peers, the fastest first; then what failed and what columns mean."""
    rows = by_operation(result)
    width = min(max([len(row["shape"]) for row in rows] + [10]), SHAPE)
    lines = [CPU] if result["device"] == "cpu" else []
    if rates := result["ceilings"]:
        copy, product = rates["copy"] / 1e12, rates["product"] / 1e12
        lines.append(f"measured ceilings: copy {copy:.3g} TB/s, product {product:.3g} TFLOP/s")
    lines.append(
        f"  {'':{width}} {'ms':>8} {'±%':>3} {'TFLOP/s':>7} {'GB/s':>5} {'MiB':>6} {'ceiling':>10} "
        f"{'goal':>12} {'':12}  peers"
    )
    operation = None
    for row in rows:
        if row["operation"] != operation:
            operation = row["operation"]
            lines.append(operation)
        lines += _lines(row, width)
    return "\n".join([*(line.rstrip() for line in lines), *_failures(rows), *LEGEND, counts(rows)])


def by_operation(result: dict[str, Any]) -> list[Record]:
    """The rows, those of an operation together: they are measured by importance."""
    order = list(dict.fromkeys(row["operation"] for row in result["rows"]))
    return sorted(result["rows"], key=lambda row: order.index(row["operation"]))


def _lines(row: Record, width: int) -> list[str]:
    """The row, and its peers below it where they do not fit behind it."""
    ratios = sorted((peer["ratio"], name) for name, peer in row["peers"].items() if "ratio" in peer)
    peers = ", ".join(f"{name} {ratio:.2f}x" for ratio, name in ratios)
    line = f"  {_truncate(row['shape'], width):{width}} {_figures(row)}  "
    if len(line) + len(peers) <= WIDTH:
        return [line + peers]
    return [line, *textwrap.wrap(peers, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _truncate(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def counts(rows: list[Record]) -> str:
    """How many rows ran and how many goals were met, in one line."""
    ran = Counter(row["status"] for row in rows)
    goals = Counter(row["verdict"] for row in rows if row["verdict"])
    said = [", ".join(f"{n} {name}" for name, n in sorted(counter.items())) for counter in (ran, goals)]
    return f"{len(rows)} rows: {said[0] or 'none'}; goals: {said[1] or 'none'}"


def _figures(row: Record) -> str:
    extra, spread = row.get("extra_bytes"), row.get("spread")
    share = "-" if row["share"] is None else f"{row['share']:.1%} {row['ceiling'][:4]}"
    time = _number(row["ms"], ".4g") if row["status"] == "ok" else STATUS[row["status"]]
    goal = "-" if row["goal"] is None else f"{row['goal'][0]} {row['goal'][1]:g}"
    rates = f"{_number(row['tflops'], '.4g'):>7} {_number(row['gbs'], '.0f'):>5}"
    mebibytes = _number(extra, ".4g", 2**-20)
    held = f"{share:>10} {goal:>12} {row['verdict'] or '':12}"
    return f"{time:>8} {_number(spread, '.0f', 100):>3} {rates} {mebibytes:>6} {held}"


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def _failures(rows: list[Record]) -> list[str]:
    """What has no time, and why: of a peer the usual reason; what was not compared with anything."""
    lines = [
        f"{row['status']}: {row['operation']} {row['shape']}: {row['reason']}" for row in rows if row["status"] != "ok"
    ]
    reasons: dict[str, Counter[str]] = {}
    for row in rows:
        for name, peer in row["peers"].items():
            if row["status"] == "ok" and "reason" in peer:
                reasons.setdefault(name, Counter())[peer["reason"]] += 1
    for name, counted in reasons.items():
        usual, more = counted.most_common(1)[0][0], " (and others)" * (len(counted) > 1)
        lines.append(f"no time for {name} in {counted.total()} row{'s' * (counted.total() > 1)}{more}: {usual}")
    unchecked = [f"{row['operation']} {row['shape']}" for row in rows if row["status"] == "ok" and row["error"] is None]
    if unchecked:
        lines.append(f"not compared, as no peer ran, in {len(unchecked)} rows: {', '.join(unchecked)}")
    return [_truncate(line, WIDTH) for line in lines]


LABEL, BAR, NOTE, ROW, TOP, BOTTOM = 470, 640, 370, 24, 84, 40
INK, FAINT, PAPER, RED = "#1b1f24", "#c9ced6", "#ffffff", "#c0392b"
COLOURS = {"met": "#2e8b57", "missed": "#d98324", "not measured": "#7a8aa0", None: "#4a78b5"}
GOAL = "#111111"


def chart(result: dict[str, Any], title: str, file: Path) -> None:
    """A PNG: one bar a row, the share of the ceiling that binds, with the goal as a black line across it."""
    rows = by_operation(result)
    image = Image.new("RGB", (LABEL + BAR + NOTE, TOP + ROW * len(rows) + BOTTOM), PAPER)
    draw = ImageDraw.Draw(image)
    text, small = ImageFont.load_default(14), ImageFont.load_default(12)
    draw.text((12, 10), "Kernels: share of the speed of light", INK, ImageFont.load_default(20))
    draw.text((12, 38), title, INK, small)
    _key(draw, small)
    bottom = TOP + ROW * len(rows)
    for tenth in range(0, 11, 2):
        x = LABEL + BAR * tenth / 10
        draw.line((x, TOP - 4, x, bottom), FAINT)
        draw.text((x, bottom + 6), f"{tenth * 10} %", INK, small, anchor="ma")
    for i, row in enumerate(rows):
        _bar(draw, row, TOP + ROW * i, text, small)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def _key(draw: ImageDraw.ImageDraw, font: Any) -> None:
    names = {"goal met": "met", "goal missed": "missed", "goal not measured": "not measured", "no goal": None}
    x = float(LABEL)
    for label, verdict in names.items():
        draw.rectangle((x, 58, x + 12, 70), COLOURS[verdict])
        draw.text((x + 18, 57), label, INK, font)
        x += 36 + draw.textlength(label, font)
    draw.line((x + 4, 55, x + 4, 73), GOAL, 3)
    draw.text((x + 12, 57), "goal", INK, font)


def _bar(draw: ImageDraw.ImageDraw, row: Record, y: int, font: Any, small: Any) -> None:
    label = f"{row['operation']}  {row['shape']}"
    while draw.textlength(label, font) > LABEL - 24:
        label = label[:-2].rstrip("…") + "…"
    draw.text((LABEL - 10, y + ROW / 2), label, INK, font, anchor="rm")
    if row["status"] != "ok":
        note = f"{row['status']}: {row['reason']}"
        draw.text((LABEL + 6, y + ROW / 2), note[:110], RED, small, anchor="lm")
        return
    share, goal = row["share"], row["goal_share"]
    if share is not None:
        draw.rectangle((LABEL, y + 4, LABEL + BAR * min(share, 1.0), y + ROW - 5), COLOURS[row["verdict"]])
    if goal is not None:
        x = LABEL + BAR * min(goal, 1.0)
        draw.line((x, y + 1, x, y + ROW - 2), GOAL, 3)
    best = row["peers"].get(row["best_peer"]) if row["best_peer"] else None
    note = f"{row['ms']:.4g} ms" if share is None else f"{share:.1%} of {row['ceiling']}, {row['ms']:.4g} ms"
    note += f", {best['ratio']:.2f}x {row['best_peer']}" if best else ""
    draw.text((LABEL + BAR + 12, y + ROW / 2), note, INK, small, anchor="lm")
