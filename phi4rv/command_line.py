"""What the command lines share: bad arguments, a device, and failures as one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

from phi4rv.errors import UserError


class Parser(argparse.ArgumentParser):
    """Reports a bad argument as every other error is reported: one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def usable_device(name: str) -> torch.device:
    """The device of this name. UserError if there is none."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device: {name} cannot be used ({str(error).splitlines()[0]})") from None
    return device


def exit_status(program: Callable[[], None], interrupted: str = "stopped") -> int:
    """Runs ``program``: 0, or 2 after one line ``error: …``, or 130 after ``interrupted`` for Ctrl-C."""
    try:
        program()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(f"error: --device: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0
