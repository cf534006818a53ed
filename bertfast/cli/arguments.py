"""What the verbs' arguments may be."""

import argparse
import math
from collections.abc import Callable


def integer(lowest: int, highest: int, multiple_of: int = 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if not lowest <= value <= highest or value % multiple_of:
            kind = "an integer" if multiple_of == 1 else f"a multiple of {multiple_of}"
            raise argparse.ArgumentTypeError(
                f"expected {kind} from {lowest} to {highest}, got {text!r}"
            )
        return value

    return parse


def number(above: float, highest: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not above < value <= highest:
            raise argparse.ArgumentTypeError(
                f"expected a number above {above:g}, at most {highest:g}, got {text!r}"
            )
        return value

    return parse
