"""``python -m phi4rv.merge --checkpoint DIR --adapter DIR --output DIR``: base and adapter as one folder in the
Hugging Face layout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from phi4rv.adapters.peft import merge_adapter
from phi4rv.checkpoint.huggingface import load, save
from phi4rv.command_line import ADAPTER, CHECKPOINT, OUTPUT, Parser, exit_status
from phi4rv.errors import UserError


def make_parser() -> Parser:
    parser = Parser("phi4rv.merge", "Merges a LoRA adapter into its base.")
    base = f"{CHECKPOINT}; the base, in the Hugging Face layout"
    parser.add("--checkpoint", required=True, kind=Path, metavar="DIR", help=base)
    parser.add("--adapter", required=True, kind=Path, metavar="DIR", help=ADAPTER)
    parser.add("--output", required=True, kind=Path, metavar="DIR", help=f"{OUTPUT}; a new folder, in the base's dtype")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.output.exists():
        raise UserError(f"--output: {args.output} exists already; name a new folder")
    model, processor = load(args.checkpoint, "cpu")
    merge_adapter(model, args.adapter)
    save(model, processor, args.output)
    print(f"written: {args.output}")


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
