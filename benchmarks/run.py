"""Runs every benchmark of the machine it is on: ``python -m benchmarks.run [--json FOLDER]``.

With ``--json`` the records go to ``FOLDER/<device>.json`` with date, commit and versions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
from pathlib import Path

import torch

from benchmarks import images

BENCHMARKS = {"images": images}


def device_name() -> str:
    """The GPU's name, else the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"CPU {names[0] if names else platform.processor()}"


def environment() -> dict[str, str]:
    """What a figure depends on beside the code."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "device": device_name(),
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("transformers", "PIL", "numpy", "triton")},
    }


def _version(module: str) -> str:
    try:
        return str(__import__(module).__version__)
    except ImportError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Every benchmark, beside its peers.")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write FOLDER/<device>.json")
    args = parser.parse_args()
    about = environment()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results = {}
    for name, benchmark in BENCHMARKS.items():
        print(f"\n{name}")
        results[name] = benchmark.run()
        print(benchmark.table(results[name]))
    if args.json:
        args.json.mkdir(parents=True, exist_ok=True)
        file = args.json / (re.sub(r"\W+", "-", about["device"]).strip("-").lower() + ".json")
        file.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
        print(f"\nwritten: {file}")


if __name__ == "__main__":
    main()
