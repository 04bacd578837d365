"""Bytes as people write them: MB = 10^6, MiB = 2^20 (GB, GiB, kB, KiB likewise)."""

import re
from fractions import Fraction

from slt_planner.errors import InputError

_BYTES_PER_UNIT = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
_BY_LOWER_CASE = {unit.lower(): unit for unit in _BYTES_PER_UNIT}
_AMOUNT = re.compile(r"\s*([+-]?\d{1,40}(?:\.\d{1,40})?)\s*([A-Za-z]*)\s*")
LARGEST_BYTES = 2**50  # a pebibyte: more is a slip of the keyboard


def parse_bytes(text: str) -> int:
    """Bytes of an amount such as ``"64MB"`` or ``"1.5 GiB"``.

    >>> parse_bytes("64MB"), parse_bytes("1KiB")
    (64000000, 1024)

    Raises:
        InputError: no number, no unit, an unknown unit, or an amount that is not between 1 B and 1 PiB.
    """
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise InputError(f"memory budget {text!r}: not an amount; write a number and a unit, such as 64MB")
    number, unit = match.groups()
    if not unit:
        raise InputError(f"memory budget {text!r} has no unit; write for example {number}MB or {number}MiB")
    if unit.lower() not in _BY_LOWER_CASE:
        known = ", ".join(_BYTES_PER_UNIT)
        raise InputError(f"memory budget {text!r}: unknown unit {unit!r}; known units are {known}")
    amount = Fraction(number) * _BYTES_PER_UNIT[_BY_LOWER_CASE[unit.lower()]]
    if not 1 <= amount <= LARGEST_BYTES:
        raise InputError(f"memory budget {text!r} is out of range; it must be between 1 B and 1 PiB")
    return int(amount)


def parse_budgets(text: str) -> dict[str, int]:
    """Budgets of a comma-separated list, by their name; a unit at the end holds for all that have none.

    >>> parse_budgets("64,128,256MB")
    {'64MB': 64000000, '128MB': 128000000, '256MB': 256000000}

    Raises:
        InputError: as `parse_bytes`, or a budget given twice.
    """
    parts = [part.strip() for part in text.split(",")]
    last = re.search(r"[A-Za-z]+$", parts[-1])
    shared_unit = last.group() if last else ""
    budgets: dict[str, int] = {}
    for part in parts:
        name = part if re.search(r"[A-Za-z]", part) else part + shared_unit
        if parse_bytes(name) in budgets.values():
            raise InputError(f"memory budgets {text!r}: {name} is given twice; give each budget once")
        budgets[name] = parse_bytes(name)
    return budgets


def short_bytes(number: int) -> str:
    """An amount of bytes as people write it, with four digits at most.

    >>> short_bytes(64_000_000), short_bytes(1_450_000), short_bytes(999)
    ('64 MB', '1.45 MB', '999 B')
    """
    unit = next((unit for unit in ("GB", "MB", "kB") if number >= _BYTES_PER_UNIT[unit]), "B")
    return f"{number / _BYTES_PER_UNIT[unit]:.4g} {unit}"


def format_bytes(number: int, round_up: bool = False) -> str:
    """An amount of bytes for people, in decimal units with one decimal place; rounded up where less would not do.

    >>> format_bytes(54_273_664), format_bytes(15_340_000, round_up=True)
    ('54.3 MB', '15.4 MB')
    """
    if number < 1000:
        return f"{number} B"
    for unit in ("kB", "MB", "GB"):
        size = _BYTES_PER_UNIT[unit]
        tenths = -(-10 * number // size) if round_up else (10 * number + size // 2) // size
        if tenths < 10_000 or unit == "GB":
            break
    return f"{tenths / 10:.1f} {unit}"
