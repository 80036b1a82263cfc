"""Rows of every benchmark, the report that is made of them, and that the committed one is up to date."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import kernels, loading, server_load, train_step
from benchmarks.inference.table import PEERS as INFERENCE_PEERS
from benchmarks.kernels.report import table_rows as kernel_rows
from benchmarks.report import results
from benchmarks.report.benchmarks import MODULES
from benchmarks.report.peers import PEERS, peer_versions
from benchmarks.report.result_files import FOLDER
from benchmarks.report.results import MARKS, PAGE, Point, Result, latest, read_all, regression
from benchmarks.report.rows import Row, table
from phi4rv.errors import UserError

ROOT = Path(__file__).parents[2]


def test_the_report_is_up_to_date() -> None:
    """Else: python -m benchmarks.report."""
    devices, broken = read_all(FOLDER)
    assert not broken
    assert (ROOT / "benchmarks" / "RESULTS.md").read_text() == results.results_text(devices, broken)
    page = (ROOT / PAGE).read_text()
    assert page == results.with_table(page, results.headline_table(devices))
    for line in (ROOT / "benchmarks" / "RESULTS.md").read_text().splitlines():
        if line.startswith("!["):
            assert (ROOT / "benchmarks" / line.partition("(")[2].removesuffix(")")).is_file(), line


def images(ms: float, peer: float = 40.0, spread: float | None = 0.01) -> dict[str, Any]:
    """Records of one size."""
    record = {"size": [8, 4], "ours_n_ms": ms, "peer_n_ms": peer, "peer_3600_ms": 2 * peer}
    return {"images": [record if spread is None else {**record, "spread": spread}]}


def write(folder: Path, date: str, commit: str, results: Any, **about: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{date}-{commit}.json"
    about = {"device": "GPU one", "date": date, "commit": commit, "torch": "2.13.0", **about}
    file.write_text(json.dumps({**about, "results": results}))
    return file


def section(text: str, head: str) -> str:
    """Under a heading, up to the next one."""
    return text.partition(f"{head}\n")[2].partition("\n#")[0]


def test_newest_course_and_what_got_slower(tmp_path: Path) -> None:
    gpu = tmp_path / "results" / "gpu-one"
    write(gpu, "2026-01-02", "bbbbbbb", images(10.0))
    write(gpu, "2026-01-01", "ccccccc", images(12.0))
    write(gpu, "2026-01-03", "aaaaaaa", images(11.0), time="10:00:00")
    write(gpu, "2026-01-03", "0000000", images(14.0, peer=7.0), time="11:00:00")
    write(tmp_path / "results" / "gpu-two", "2026-01-01", "ccccccc", images(99.0), device="GPU two")
    devices, broken = read_all(tmp_path / "results")
    assert not broken and list(devices) == ["gpu-one", "gpu-two"]
    text = results.results_text(devices, broken)
    assert text == results.results_text(*read_all(tmp_path / "results"))
    one, two = text.partition("## GPU one")[2].split("## GPU two")
    newest = section(one, "### images")
    assert "| 8x4, as many patches | 14 ms | transformers: 7 ms | 0.50x | - | - |  | 2026-01-03 0000000 |" in newest
    course = section(one, "#### Course of images")
    order = ["what", "2026-01-01 ccccccc", "2026-01-02 bbbbbbb", "2026-01-03 aaaaaaa", "2026-01-03 0000000"]
    assert course.splitlines()[1] == "| " + " | ".join(order) + " |"
    assert "| 8x4, published | 12 ms | 10 ms | 11 ms | 14 ms |" in course
    assert "8x4, published: 14 ms (2026-01-03 0000000), 40% worse than 10 ms (2026-01-02 bbbbbbb)" in one
    assert "Course" not in two and "Nothing" in two and "99 ms" in two
    files = results.draw_all(devices, tmp_path / "results")
    named = [line.partition("(")[2].removesuffix(")") for line in text.splitlines() if line.startswith("![")]
    assert sorted(files) == sorted(tmp_path / name for name in named)
    for file in files:
        with Image.open(file) as image:
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 4


def point(ours: float | None, **more: Any) -> Point:
    row = Row("images", "8x4", ours, "ms", **{"noise": 0.05, **more})
    return Point(Result("", {"date": "", "commit": ""}, []), row)


@pytest.mark.parametrize(
    ("figures", "more", "worse"),
    [
        ([10, 10.9], {}, None),  # within both noises, 5 % each
        ([10, 11.1], {}, 0.11),
        ([11.1, 10, 10.9], {}, None),
        ([10, 20, 12], {}, 0.2),  # than the best, not the last
        ([10, 12, None], {}, 0.2),  # without a figure the one before counts
        ([10, 8], {}, None),
        ([10, 9], {"lower_is_better": False}, 1 / 9),
        ([10, 12], {"lower_is_better": False}, None),
        ([10, 10.3], {"noise": 0.0}, None),  # no figure is exact
        ([10, 10.5], {"noise": 0.0}, 0.05),
        ([10, 11.9], {"noise": None}, None),  # what is not known is taken to be large
        ([10, 12.1], {"noise": None}, 0.21),
        ([None, 10], {}, None),
        ([10], {}, None),
    ],
)
def test_noise(figures: list[float | None], more: dict[str, Any], worse: float | None) -> None:
    found = regression([point(ours, **more) for ours in figures])
    assert (found and found[1]) == (worse and pytest.approx(worse))


def test_a_row_without_a_figure_says_why() -> None:
    points = [point(None, reason="failed: no such kernel")]
    assert latest(points).row.value is None
    assert "| 8x4 | failed: no such kernel | - |" in results.newest_table(points)


def test_what_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "results" / "gpu-one"
    write(folder, "2026-01-01", "good", images(10.0, spread=None))
    write(folder, "2026-01-01", "key", {"images": [{"size": [1, 2]}]})
    write(folder, "2026-01-01", "kind", {"images": 7})
    write(folder, "2026-01-01", "name", {"pictures": []})
    (folder / "2026-01-01-cut.json").write_text('{"device": "GPU')
    (folder / "2026-01-01-list.json").write_text("[]")
    (folder / "2026-01-01-none.json").write_text('{"results": {}}')
    devices, broken = read_all(tmp_path / "results")
    assert [result.name for result in devices["gpu-one"]] == ["2026-01-01-good"]
    names = ["cut", "key", "kind", "list", "name", "none"]
    assert [line.partition(": ")[0] for line in broken] == [f"gpu-one/2026-01-01-{name}.json" for name in names]
    assert "no 'ours_n_ms'" in broken[1] and "no benchmark pictures; there are images" in broken[4]
    assert not any("\n" in line for line in broken)
    text = results.results_text(devices, broken)
    assert all(f"- {line}" in text for line in broken)


def test_runs_that_only_show_that_they_run_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"operation": "rope", "shape": "4", "backward": False, "goal": ["copy", 0.9], "status": "ok", "ms": 1.0,
         "reason": None, "share": 0.5, "ceiling": "copy", "peers": {}, "best_peer": None, "verdict": None},
    ]  # fmt: skip
    write(tmp_path / "cpu", "2026-01-01", "a", {"kernels": {"device": "cpu", "ceilings": {}, "rows": rows}})
    assert read_all(tmp_path) == ({}, [])
    write(tmp_path / "gpu", "2026-01-01", "a", {"kernels": {"device": "cuda", "ceilings": {}, "rows": rows}})
    (result,) = read_all(tmp_path)[0]["gpu"]
    assert [(row.what, row.goal, row.headline) for row in result.rows] == [("rope: 4", "90% of copy", True)]


def test_a_goal_that_names_a_peer_shows_that_one() -> None:
    peers = {"cublas products": {"ms": 3.0}, "torch": {"ms": 2.5}, "gone": {"reason": "not installed"}}
    row = {"operation": "projector", "shape": "8", "backward": False, "goal": ["cublas products", 1.0], "status": "ok",
           "reason": None, "ms": 2.0, "share": None, "ceiling": None, "peers": peers, "best_peer": "torch",
           "verdict": "met", "spread": 0.01}  # fmt: skip
    others = [{**row, "goal": ["peer", 1.3]}, {**row, "goal": ["gone", 1.0]}]
    found = kernel_rows({"device": "cuda", "rows": [row, *others]})
    assert [(r.peer, r.ratio, r.goal) for r in found] == [
        ("cublas products", 1.5, "1x cublas products"), ("torch", 1.25, "1.3x"), ("torch", 1.25, "1x gone"),
    ]  # fmt: skip
    assert [r.headline for r in found] == [True, False, False]
    printed = table(found)
    assert "cublas products: 3 ms" in printed and "1.50x" in printed and printed.count("kernels") == 1


def test_the_page_holds_the_newest_rows_alone() -> None:
    measured = [
        Result(f"{n}", {"device": "GPU", "date": "2026-01-01", "commit": f"{n}", "torch": ""},
               [Row("images", "a", float(n), "ms", headline=True), Row("images", "b", 7.5, "ms")])
        for n in (1, 2)
    ]  # fmt: skip
    before = f"intro\n\n{MARKS[0]}\n\nold 123\n\n{MARKS[1]}\nrest\n"
    after = results.with_table(before, results.headline_table({"gpu": measured}))
    assert after.startswith(f"intro\n\n{MARKS[0]}\n\nGPU:") and after.endswith(f"{MARKS[1]}\nrest\n")
    assert "images: a | 2 ms" in after and "1 ms" not in after and "7.5" not in after and "old" not in after
    assert results.with_table(after, results.headline_table({"gpu": measured})) == after
    with pytest.raises(UserError, match=f"{PAGE}: the marks"):
        results.with_table("no marks", "table")


def test_ratio_is_how_many_times_better() -> None:
    assert Row("images", "a", 2.0, "ms", peer_value=3.0).ratio == 1.5
    assert Row("images", "a", 2.0, "tokens/s", lower_is_better=False, peer_value=3.0).ratio == pytest.approx(2 / 3)
    assert Row("images", "a", 0.0, "%", peer_value=3.0).ratio is None
    assert Row("images", "a", None, "ms", peer_value=3.0).ratio is None


def test_every_peer_has_a_version_and_settings() -> None:
    """At full size and tiny; and every case has a name of its own."""
    for tiny in (True, False):
        cases = [
            case
            for name in kernels.operation_names()
            for case in importlib.import_module(f"benchmarks.kernels.cases.{name}").cases(tiny)
        ]
        assert {peer for case in cases for peer in case.peers} <= set(PEERS)
        assert len({(case.operation, case.shape) for case in cases}) == len(cases)
    assert {*train_step.PEERS, *INFERENCE_PEERS, "vLLM"} <= set(PEERS)
    for peer in peer_versions().values():
        assert peer["version"] and peer["settings"]


def test_every_benchmark_gives_rows() -> None:
    for name in MODULES:
        assert callable(importlib.import_module(MODULES[name]).table_rows), name


def test_rows_of_loading_and_of_the_server() -> None:
    share = {"layers": 8, "device": "cuda:0", "share": 0.5}
    records = [
        {"case": case, "rate": rate * 1e9, **share} for case, rate in (("ours", 40), ("int4", 30), ("safetensors", 8))
    ]
    whole, int4 = loading.table_rows([{**records[0], "verdict": "missed"}, *records[1:]])
    assert (whole.what, whole.value, whole.ratio, whole.verdict) == ("8 decoder layers to cuda", 40, 5, "missed")
    assert int4.what.endswith(", int4") and int4.value == 30 and int4.verdict is None
    made = {"clients": 5, "requests": 9, "requests_per_second": 3.5, "seconds_to_first_token": {"p50": 1.0, "p99": 2.0},
            "dropped": {"refused": 1}, "different": 2, "answers_lost_by_sigterm": 3}  # fmt: skip
    rate, *first, wrong = server_load.table_rows(made)
    assert (rate.value, [row.value for row in first], wrong.value) == (3.5, [1, 2], 6)
