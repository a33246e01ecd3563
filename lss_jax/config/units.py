"""Sizes in bytes, as people write and read them."""

import re

from lss_jax.config.schema import ConfigError

UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(written: str, option: str = "--memory") -> int:
    """Parses `16GiB`, `80GB` or `512MiB`, the value of an option, into bytes.

    Raises:
      ConfigError: it is not a number with a unit, or zero.
    """
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", written)
    if not match or not float(match[1]):
        raise ConfigError(f"{option}={written} is no size; write it like 16GiB, with a unit of {', '.join(UNITS)}")
    return round(float(match[1]) * UNITS[match[2]])


def shown_size(count: float) -> str:
    """Formats bytes with a unit, as in `1.50 GiB`."""
    unit = next(unit for unit in ("TiB", "GiB", "MiB") if count >= UNITS[unit] or unit == "MiB")
    return f"{count / UNITS[unit]:,.2f} {unit}"
