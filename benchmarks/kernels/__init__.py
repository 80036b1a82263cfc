"""Kernel benchmarks, one file an operation: its real shapes, the bytes and operations it must do, and its peers."""

from __future__ import annotations

from pathlib import Path


def operation_names(folder: Path = Path(__file__).parent / "cases") -> list[str]:
    """Names of the files that define ``cases``."""
    return sorted(file.stem for file in folder.glob("*.py") if "\ndef cases(" in file.read_text())
