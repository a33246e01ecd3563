"""Tables as the results of experiments have them."""

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and half of the range where there are several."""
    shown = f"{statistics.mean(values):.{digits}f}"
    return f"{shown} ± {(max(values) - min(values)) / 2:.{digits}f}" if values[1:] else shown


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
