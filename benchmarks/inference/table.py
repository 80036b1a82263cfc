"""The records of ``benchmarks/inference/command.py`` judged by their goals, and as text for a terminal."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.inference.roofline import Record, weight_format
from benchmarks.report.rows import Row
from phi4rv.config import Config

# Of an H100; the shares are of rates measured in the same run.
SHARE = {"bf16": 0.90, "fp8": 0.80, "int4": 0.75}  # of the copy rate, by the format of the weights
FIRST_SHARE, UPLOAD_SHARE = 0.65, 0.80
OVER_PEER = {"decode": 3.0, "first token": 2.0}
TOWER_MS, SECOND, AT_ONCE = 10.0, 5.0, 15.0
UNITS = {"s": 1.0, "ms": 1e3}
CEILINGS = {"decode": "copy", "first token": "product", "load": "upload"}
LOGPROB_TOLERANCE = 0.1  # by how much the log-probability of the first token may differ from the peer's
PEERS = ("transformers", "transformers, static cache", "transformers, flash-attn")


def goals(result: Record) -> list[Record]:
    """What the fastest of our contenders reached, and whether it is enough: on a GPU, by the whole model."""
    contenders = result["sides"]
    judged = []

    def judge(name: str, value: float | None, goal: float, at_most: bool = False) -> None:
        known = result["device"] == "cuda" and result["layers"] == Config().num_hidden_layers and value is not None
        enough = known and (value <= goal if at_most else value >= goal)
        verdict = ("met" if enough else "missed") if known else "not measured"
        judged.append({"name": name, "goal": goal, "at_most": at_most, "value": value, "verdict": verdict})

    for form, share in SHARE.items():
        judge(f"decode, {form}: share of the copy rate", _best(contenders, "decode", "share", form), share)
    judge("first token: share of the product rate", _best(contenders, "first token", "share"), FIRST_SHARE)
    for case, goal in OVER_PEER.items():
        judge(f"{case} over transformers", over_peer(contenders, case), goal)
    judge("tower and projector, ms", _best(contenders, "tower", "ms", lower_is_better=True), TOWER_MS, at_most=True)
    judge("second question, times faster", _best(contenders, "second question", "ratio"), SECOND)
    judge("many requests at once over one", _best(contenders, "at once", "ratio"), AT_ONCE)
    judge("load: share of the copy rate to the GPU", _best(contenders, "load", "share"), UPLOAD_SHARE)
    return judged


def _ours(contenders: dict[str, Record], case: str, form: str = "bf16") -> dict[str, Record]:
    own = {
        s: c[case]
        for s, c in contenders.items()
        if s not in (*PEERS, "vLLM") and weight_format(s) == form and case in c
    }
    return {contender: r for contender, r in own.items() if "reason" not in r}


def _best(
    contenders: dict[str, Record], case: str, key: str, form: str = "bf16", lower_is_better: bool = False
) -> float | None:
    values = [r[key] for r in _ours(contenders, case, form).values()]
    return (min if lower_is_better else max)(values, default=None)


def over_peer(contenders: dict[str, Record], case: str) -> float | None:
    """The fastest peer's time over ours; of ours only those count that make the first token as the peer does."""
    peers = [
        contenders[p][case] for p in PEERS if case in contenders.get(p, {}) and "reason" not in contenders[p][case]
    ]
    ours = [r for r in _ours(contenders, case).values() if any(same_first_token(r, p) for p in peers)]
    return min(p["seconds"] for p in peers) / min(r["seconds"] for r in ours) if ours else None


def same_first_token(ours: Record, peer: Record) -> bool:
    """Whether our first token is among the peer's most probable ones, and as probable."""
    token, logprob = ours["top"][0]
    return any(token == other and abs(logprob - its) <= LOGPROB_TOLERANCE for other, its in peer["top"])


def table_rows(result: Record) -> list[Row]:
    """The fastest of our contenders in each case beside the fastest peer; shares with goals of their own again."""
    contenders, judged = result["sides"], {goal["name"]: goal for goal in goals(result)}
    cut = "" if result["layers"] == Config().num_hidden_layers else f", {result['layers']} decoder layers"
    found = []

    def add(what: str, case: str, unit: str, goal: str, named: str, form: str = "bf16", percent: bool = False) -> None:
        ours, peer = (_fastest(s, case, unit) for s in (_ours(contenders, case, form), _peers(contenders, case, form)))
        record = ours[1] if ours else {}
        if case == "second question" and ours:
            peer = 1e3 * record["first_seconds"], {}, "the first one"
        row = Row(
            "inference", what + cut, ours[0] if ours else None, unit, lower_is_better=unit in ("ms", "s"),
            peer=peer[2] if peer else None, peer_value=peer[0] if peer else None,
            share=record.get("share"), ceiling=CEILINGS.get(case), goal=goal, verdict=judged[named]["verdict"],
            noise=record.get("spread"), reason=None if ours else _missing_reason(contenders, case, form),
            tiny=result["device"] == "cpu", headline=True,
        )  # fmt: skip
        if percent:
            alone = {"peer": None, "peer_value": None, "share": None, "lower_is_better": False}
            row = replace(row, value=100 * record["share"] if ours else None, unit="%", **alone)
        found.append(row)

    add("decode, bf16", "decode", "tokens/s", f"{OVER_PEER['decode']:g}x", "decode over transformers")
    for form, share in SHARE.items():
        name, bare = f"decode, {form}: share of the copy rate", form == "bf16"
        add(name if bare else f"decode, {form}", "decode", "tokens/s", f"{share:.0%} of copy", name, form, percent=bare)
    add("first token", "first token", "ms", f"{OVER_PEER['first token']:g}x", "first token over transformers")
    name = "first token: share of the product rate"
    add(name, "first token", "ms", f"{FIRST_SHARE:.0%} of product", name, percent=True)
    add("tower and projector", "tower", "ms", f"≤ {TOWER_MS:g} ms", "tower and projector, ms")
    add("second question", "second question", "ms", f"{SECOND:g}x", "second question, times faster")
    many = "many requests at once over one"
    add(f"{result['many']} requests at once", "at once", "tokens/s", f"{AT_ONCE:g}x of one", many)
    add("load", "load", "s", f"{UPLOAD_SHARE:.0%} of upload", "load: share of the copy rate to the GPU")
    return found


def _fastest(contenders: dict[str, Record], case: str, unit: str) -> tuple[float, Record, str] | None:
    """Figure in ``unit``, record and name of the contender that does best."""
    if unit == "tokens/s":
        figures = [(-r["tokens_per_second"], r, contender) for contender, r in contenders.items()]
    else:
        figures = [
            (r["ms"] if case == "tower" else UNITS[unit] * r["seconds"], r, contender)
            for contender, r in contenders.items()
        ]
    best = min(figures, key=lambda figure: figure[0], default=None)
    return best and (abs(best[0]), *best[1:])


def _peers(contenders: dict[str, Record], case: str, form: str) -> dict[str, Record]:
    """All are in bf16."""
    given = {
        contender: contenders[contender][case]
        for contender in (*PEERS, "vLLM")
        if case in contenders.get(contender, {}) and form == "bf16"
    }
    return {contender: r for contender, r in given.items() if "reason" not in r}


def _missing_reason(contenders: dict[str, Record], case: str, form: str) -> str:
    own = {s: c for s, c in contenders.items() if s not in (*PEERS, "vLLM") and weight_format(s) == form}
    own = {s: c for s, c in own.items() if (s == "load") == (case == "load")}
    said = {contender: cases.get("reason") or cases.get(case, {}).get("reason") for contender, cases in own.items()}
    return "; ".join(f"{contender}: {reason}" for contender, reason in said.items() if reason) or "no contender has it"


def table(result: Record) -> str:
    lines = ["On a CPU, tiny: what counts is that everything runs."] if result["device"] == "cpu" else []
    whole = Config().num_hidden_layers
    cut = f" of {whole}" if result["device"] == "cuda" and result["layers"] < whole else ""
    lines.append(
        f"{result['layers']} decoder layers{cut}; measured: copy {_rate(result['copy'])}B/s, product "
        f"{_rate(result['product'])}FLOP/s, copy to the device {_rate(result['upload'])}B/s"
    )
    for contender, cases in result["sides"].items():
        if "reason" in cases:
            lines.append(f"  {contender:27} {cases['reason']}")
            continue
        for case, r in cases.items():
            lines.append(f"  {contender:27} {case:16} {r['reason'] if 'reason' in r else FIGURES[case](r)}")
    lines += [line for case in OVER_PEER for line in _first_token_mismatches(result["sides"], case)]
    for goal in goals(result):
        value = "-" if goal["value"] is None else f"{goal['value']:.3g}"
        bound = "at most" if goal["at_most"] else "at least"
        lines.append(f"goal: {goal['name']}: {bound} {goal['goal']:g}, is {value}: {goal['verdict']}")
    return "\n".join(lines)


def _decode(r: Record) -> str:
    said = f"{r['tokens_per_second']:,.1f} tokens/s, {_rate(r['bytes_per_second'])}B/s ({r['share']:.1%} of copy)"
    if r["between"]:
        said += f", between tokens {r['between']['median'] * 1e3:.3g} ms, p99 {r['between']['p99'] * 1e3:.3g} ms"
    return said + ("" if r["joules"] is None else f", {r['joules']:.3g} J/token")


def _first(r: Record) -> str:
    said = f"{r['seconds'] * 1e3:,.1f} ms, {r['patches']} patches, "
    return said + f"{_rate(r['operations_per_second'])}FLOP/s ({r['share']:.1%} of product)"


def _at_once(r: Record) -> str:
    said = f"{r['tokens_per_second']:,.0f} tokens/s by {r['requests']} requests, {r['one']:,.1f} by one"
    return f"{said} ({r['ratio']:.1f}x)"


FIGURES = {
    "decode": _decode,
    "first token": _first,
    "tower": lambda r: f"{r['ms']:.3g} ms, {r['patches']} patches, with the projector",
    "second question": lambda r: f"{r['seconds'] * 1e3:,.1f} ms, the first {r['first_seconds'] * 1e3:,.1f} ms",
    "at once": _at_once,
    "load": lambda r: (
        f"{r['bytes'] / 1e9:.3g} GB in {r['seconds']:.3g} s, {_rate(r['bytes_per_second'])}B/s "
        f"({r['share']:.1%} of the copy to the device)"
    ),
}


def _rate(value: float) -> str:
    """3.01e12 -> ``3.01 T``."""
    unit, power = next((pair for pair in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if value >= pair[1]), ("k", 1e3))
    return f"{value / power:.3g} {unit}"


def _first_token_mismatches(contenders: dict[str, Record], case: str) -> list[str]:
    """Of contenders of ours whose first token is not the peers': they do not count against them."""
    peers = [contenders[p][case] for p in PEERS if "top" in contenders.get(p, {}).get(case, {})]
    ours = [
        contender
        for contender, r in _ours(contenders, case).items()
        if peers and not any(same_first_token(r, p) for p in peers)
    ]
    return [f"  {case}: {contender} and transformers do not agree on the first token" for contender in ours]
