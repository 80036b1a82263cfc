"""The benchmarks whose records are kept, and the rows that they make of them."""

from __future__ import annotations

import importlib
from typing import Any

from benchmarks.report.rows import Row

# Each module has table_rows(records) and a command line; no job calls those of the last two.
MODULES = {
    "images": "benchmarks.images",
    "data": "benchmarks.data.loading_and_packing",
    "saving": "benchmarks.saving",
    "kernels": "benchmarks.kernels.__main__",
    "train_step": "benchmarks.train_step",
    "inference": "benchmarks.inference.command",
    "loading": "benchmarks.loading",
    "server_load": "benchmarks.server_load",
}


def table_rows(results: dict[str, Any]) -> list[Row]:
    """Of the records of each benchmark, in the order of MODULES. ValueError if there is no such benchmark."""
    if unknown := sorted(set(results) - set(MODULES)):
        raise ValueError(f"no benchmark {', '.join(unknown)}; there are {', '.join(MODULES)}")
    modules = {name: importlib.import_module(module) for name, module in MODULES.items() if name in results}
    return [row for name, module in modules.items() for row in module.table_rows(results[name])]
