"""Where results lie, ``benchmarks/results/<device>/<date>-<commit>.json``, and what they depend on beside the code."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.report.peers import peer_versions, version

FOLDER = Path(__file__).parents[1] / "results"
# Key in the file: distribution.
PACKAGES = {
    "transformers": "transformers",
    "PIL": "pillow",
    "numpy": "numpy",
    "triton": "triton",
    "liger_kernel": "liger-kernel",
    "flash_attn": "flash-attn",
}


def device_name() -> str:
    """The GPU's name, else the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"CPU {names[0] if names else platform.processor()}"


def environment() -> dict[str, str]:
    """Device, date and time (UTC), commit and versions. Where there is no git, the variable COMMIT names the commit."""
    now = datetime.datetime.now(datetime.UTC)
    about = {
        "device": device_name(),
        "date": now.date().isoformat(),
        "time": now.strftime("%H:%M:%S"),
        "commit": _output("git", "describe", "--always", "--dirty") or os.environ.get("COMMIT") or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{key: version(distribution) for key, distribution in PACKAGES.items()},
    }
    if torch.cuda.is_available():
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        about |= {"cuda": str(torch.version.cuda), "driver": driver[0] if driver else "unknown"}
        about["cudnn"] = str(torch.backends.cudnn.version())
    return about


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def file_for(about: dict[str, str], folder: Path = FOLDER) -> Path:
    """Where a run in this environment is kept."""
    device = re.sub(r"\W+", "-", about["device"]).strip("-").lower()
    return folder / device / f"{about['date']}-{about['commit']}.json"


def write_results(file: Path, results: dict[str, Any], about: dict[str, str] | None = None, **more: Any) -> None:
    """The environment, the peers, and the results of each benchmark, by name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    about = environment() if about is None else about
    file.write_text(
        json.dumps({**about, "peers": peer_versions(), **more, "results": results}, indent=1, allow_nan=False) + "\n"
    )
