"""The benchmarks as a whole: a process that dies, a part that hangs or fails, and what is kept of the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import gpu, jobs, run
from benchmarks.jobs import Job, python_module, run_jobs
from benchmarks.kernels import operation_names, suite
from benchmarks.report.result_files import environment, file_for
from tests.kernels import sanitize

ROOT = Path(__file__).parents[2]


def test_command_line(tmp_path: Path) -> None:
    file, picture = tmp_path / "out" / "records.json", tmp_path / "chart.png"
    command = python_module("benchmarks.kernels", "--only", "rms_norm", "--json", str(file), "--chart", str(picture))
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rms_norm" in done.stdout and "2 rows: 2 ok" in done.stdout
    written = json.loads(file.read_text())
    assert {"device", "date", "commit", "torch", "triton"} <= written.keys()
    rows = written["results"]["kernels"]["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok"] and rows[1]["backward"]
    assert all(row["error"] < 1e-5 and row["ms"] > 0 and row["peers"]["torch"]["ms"] > 0 for row in rows)
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 5


FAKES = """
import os, threading
from benchmarks.kernels.case import Case

def double(x):
    return 2 * x

def die(x):
    os._exit(9)

def hang(x):
    threading.Event().wait()

def case(shape, ours, **peers):
    return Case("fakes", shape, lambda draw: (draw.normal(3),), ours, {**peers, "good": double})

def cases(tiny):
    return [
        case("dies", die), case("peer dies", double, bad=die), case("hangs", hang), case("fine", double),
    ]
"""


def test_nothing_stops_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that ends its process, a peer that does, one that hangs, a file that cannot be read."""
    package = tmp_path / "fakekernels"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "fakes.py").write_text(FAKES)
    (package / "unreadable.py").write_text("def cases(tiny):\n    raise KeyError('no shapes')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = suite.run(["unreadable", "fakes"], package="fakekernels", hang_seconds=3)["rows"]
    assert [(row["operation"], row["shape"], row["status"]) for row in rows] == [
        ("unreadable", "", "failed"),
        ("fakes", "dies", "failed"),
        ("fakes", "peer dies", "ok"),
        ("fakes", "hangs", "failed"),
        ("fakes", "fine", "ok"),
    ]
    assert rows[0]["reason"] == "KeyError: 'no shapes'"
    assert rows[1]["reason"] == "the process ended with 9" and rows[3]["reason"] == "no answer for 3 s"
    assert rows[2]["peers"]["bad"] == {"reason": "the process ended with 9"} and "ratio" in rows[2]["peers"]["good"]
    late = suite.run(["fakes"], 0.0, package="fakekernels")
    assert [(row["status"], row["reason"]) for row in late["rows"]] == [("not measured", "out of time")]
    capsys.readouterr()


def test_every_operation_is_found() -> None:
    assert "rms_norm" in operation_names()
    assert not {"case", "timing", "measure", "__init__", "__main__"} & set(operation_names())


def shell(script: str) -> Callable[[Path, float], list[str]]:
    return lambda file, seconds: ["/bin/sh", "-c", f"FILE={file}; SECONDS_LEFT={seconds:.0f}; {script}"]


RECORDS = """echo '{"results": {"images": []}}' > $FILE"""


def test_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pid = tmp_path / "pid"
    fakes = [
        Job("good", 60, shell(f"echo fine; {RECORDS}")),
        Job("bad", 60, shell("echo oh dear; exit 3")),
        Job("slow", 0.5, shell(f"echo begun; {RECORDS}; sleep 600 & echo $! > {pid}; wait")),
        Job("absent", 60, shell(f"echo no tool; exit {jobs.SKIPPED}")),
        Job("needs a GPU", 60, shell("exit 4"), gpu=True),
        Job("no such", 60, lambda file, seconds: ["/no/such/command"]),
        Job("last", 60, shell("echo still here, $SECONDS_LEFT")),
    ]
    outcomes, results = run_jobs(fakes, tmp_path / "logs", have_gpu=False)
    states = {name: outcome["state"] for name, outcome in outcomes.items()}
    assert states == {
        "good": "passed", "bad": "failed", "slow": "out of time", "absent": "skipped", "needs a GPU": "skipped",
        "no such": "failed", "last": "passed",
    }  # fmt: skip
    assert results == {"images": []} and outcomes["bad"]["exit"] == 3
    assert outcomes["last"]["last"] == "still here, 54"
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert "oh dear" in capsys.readouterr().out


def test_gpu_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts by name, one file for all calls, exit status by the worst."""
    record = {"size": [8, 4], "ours_n_ms": 5, "peer_n_ms": 8, "peer_3600_ms": 9}
    writes = f"""echo '{json.dumps({"results": {"images": [record]}})}' > $FILE"""
    monkeypatch.setattr(run, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(gpu, "JOBS", [Job("tests", 60, shell("exit 1")), Job("images", 60, shell(writes))])
    monkeypatch.setattr(gpu, "EXTRA_JOBS", [])
    folder = ["--json", str(tmp_path / "results")]
    capsys.readouterr()
    assert gpu.main(["images", *folder]) == 0
    printed = capsys.readouterr().out
    assert "8x4, as many patches" in printed and "5 ms" in printed and "1.60x" in printed
    assert gpu.main(["tests", *folder, "--seconds", "30"]) == 1
    file = file_for(environment(), tmp_path / "results")
    written = json.loads(file.read_text())
    assert {name: part["state"] for name, part in written["parts"].items()} == {"images": "passed", "tests": "failed"}
    assert written["results"] == {"images": [record]}
    assert {"version", "settings"} == written["peers"]["transformers"].keys()
    assert "8x4, as many patches" in capsys.readouterr().out  # what an earlier call left is in the table too
    assert gpu.main(folder) == 1
    capsys.readouterr()
    assert gpu.main(["kernel", *folder]) == 2
    assert capsys.readouterr().err == "error: PART: 'kernel' is unknown, must be one of tests, images\n"


def test_the_limits_fit_eight_minutes() -> None:
    assert sum(part.seconds for part in gpu.JOBS) <= 475
    every = [*gpu.JOBS, *gpu.EXTRA_JOBS]
    assert {part.name for part in gpu.JOBS} == {"build", "tests", "kernels", "train_step", "inference"}
    assert {part.name for part in every} >= set(gpu.NAMED_SECONDS) | {"golden", "sanitizer", "images"}
    assert max(gpu.NAMED_SECONDS.values()) <= 480 and all(
        part.seconds <= gpu.NAMED_SECONDS.get(part.name, 300) for part in every
    )
    for part in every:
        assert part.command(Path("file.json"), 10.0)[0] == sys.executable


def test_results_lie_by_device_date_and_commit() -> None:
    about = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-11-24", "commit": "abc1234"}
    assert file_for(about, Path("r")) == Path("r/nvidia-h100-80gb-hbm3/2026-11-24-abc1234.json")
    for file in (ROOT / "benchmarks" / "results").rglob("*.json"):
        assert file == file_for(json.loads(file.read_text()))


def tool(folder: Path, script: str) -> str:
    """A stand-in for compute-sanitizer; the PATH that finds it."""
    folder.mkdir()
    (folder / "compute-sanitizer").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "compute-sanitizer").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.main([]) == jobs.SKIPPED and "not on the PATH" in capsys.readouterr().out
    monkeypatch.undo()
    only_run = 'while [ "$1" != "-m" ]; do last="$1"; shift; done; exec "$last" "$@"'
    monkeypatch.setenv("PATH", tool(tmp_path / "runs", only_run))
    assert sanitize.main(["rms_norm", "case"]) == 1
    printed = capsys.readouterr().out
    assert "ok rms_norm" in printed and "memcheck: failed: case" in printed
    monkeypatch.undo()
    dies = 'while [ "$1" != "--inside" ]; do shift; done; echo "begin $2"; exit 1'
    monkeypatch.setenv("PATH", tool(tmp_path / "dies", dies))
    assert sanitize.main(["a", "b", "c"]) == 1
    assert "memcheck: failed: a, b, c" in capsys.readouterr().out
