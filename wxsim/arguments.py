"""What the commands' options share."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable


def number(kind: Callable[[str], float], least: float, most: int) -> Callable[[str], float]:
    """Return what argparse takes as the type of a number from ``least`` to ``most``."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"must be a number from {least} to {most}, not {text!r}")

    return convert
