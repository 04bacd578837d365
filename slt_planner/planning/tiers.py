"""Tiers files: device classes as people write them down, in TOML. Files are data; no torch here."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError

from slt_planner.config import Record, Tier
from slt_planner.errors import InputError, first_invalid
from slt_planner.files import read_text
from slt_planner.units import parse_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NAME = re.compile(r"[\w.+-]{1,40}")
_BITS_PER_BYTE = 8


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("use 1 to 40 letters, digits and . _ + -")
    return name


def _bytes(budget: Any) -> int:
    if not isinstance(budget, str):
        raise ValueError('write it in quotes and with its unit, such as "64MB"')
    return parse_bytes(budget)


_Figure = Annotated[float | None, Field(ge=1e-6, le=1e9)]


class _TierTable(Record):
    """A ``[[tier]]`` table, in the units that people write; `budget` becomes bytes."""

    model_config = ConfigDict(strict=True)

    name: Annotated[str, AfterValidator(_checked_name)]
    budget: Annotated[int, BeforeValidator(_bytes)]
    share: float | None = Field(default=None, gt=0, le=1)
    gflops: _Figure = None
    upload_mbit_per_s: _Figure = None
    download_mbit_per_s: _Figure = None
    power_w: _Figure = None
    link_power_w: _Figure = None

    def tier(self, share: float) -> Tier:
        return Tier(
            name=self.name,
            budget_bytes=self.budget,
            share=share,
            flops_per_s=_times(self.gflops, 1e9),
            upload_bytes_per_s=_times(self.upload_mbit_per_s, 1e6 / _BITS_PER_BYTE),
            download_bytes_per_s=_times(self.download_mbit_per_s, 1e6 / _BITS_PER_BYTE),
            power_w=self.power_w,
            link_power_w=self.link_power_w,
        )


def _times(figure: float | None, factor: float) -> float | None:
    return None if figure is None else figure * factor


def load_tiers(path: str | Path, select: str | Sequence[str] | None = None) -> tuple[Tier, ...]:
    """Read a tiers file: tiers, weakest first.

    Args:
        path: the file; `parse_tiers` says what is in it.
        select: which tiers to take, by name (``"phone-a,gateway"`` or a list); all by default. Their shares are
            scaled so that they add up to 1.

    Raises:
        InputError: the file cannot be read or is not a valid tiers file, or it has no tier that `select` names; the
            message gives the file, the tier and the key.
    """
    text = read_text(path, "tiers file", "profiles/devices.toml is one to start from")
    try:
        return parse_tiers(text, select)
    except InputError as error:
        raise InputError(f"tiers file {path}: {error}") from error


def parse_tiers(text: str, select: str | Sequence[str] | None = None) -> tuple[Tier, ...]:
    """Tiers, weakest first, of the text of a tiers file.

    It is TOML and holds a ``[[tier]]`` table a tier: `name` and `budget`; `share`, its fraction of all clients (every
    tier has one and they add up to 1, or none has and they are equal); and, where known, `gflops`,
    `upload_mbit_per_s`, `download_mbit_per_s`, `power_w` and `link_power_w` (see `config.DeviceFigures`).

    >>> camera, phone = parse_tiers('''
    ...     [[tier]]
    ...     name = "phone"
    ...     budget = "128MB"
    ...     share = 0.25
    ...     upload_mbit_per_s = 11
    ...     [[tier]]
    ...     name = "camera"
    ...     budget = "4MB"
    ...     share = 0.75
    ... ''')
    >>> camera.name, camera.share, phone.budget_bytes, phone.upload_bytes_per_s
    ('camera', 0.75, 128000000, 1375000.0)

    Raises:
        InputError: see `load_tiers`.
    """
    tables = _tables(text)
    shares = _shares(tables)
    chosen = list(tables) if select is None else _selected(select, tables)
    total = math.fsum(shares[name] for name in chosen)
    tiers = (tables[name].tier(shares[name] / total) for name in chosen)
    return tuple(sorted(tiers, key=lambda tier: tier.budget_bytes))


def _tables(text: str) -> Mapping[str, _TierTable]:
    """The file's tables by the names of their tiers."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # thousands of digits or brackets among them
        raise InputError(f"not TOML ({str(error).splitlines()[0]})") from error
    _refuse_unknown(document, ["tier"])
    written = document.get("tier", [])
    if not isinstance(written, list) or not all(isinstance(table, dict) for table in written):
        raise InputError("tier: give each tier a table of its own, under [[tier]]")
    tables: dict[str, _TierTable] = {}
    for number, fields in enumerate(written, start=1):
        table = _table(number, fields)
        if table.name in tables:
            raise InputError(f"tier {number}: name: {table.name!r} is taken; give each tier a name of its own")
        tables[table.name] = table
    if not tables:
        raise InputError('no tier in it; write at least one [[tier]] with a name and a budget such as "64MB"')
    return tables


def _table(number: int, fields: Mapping[str, Any]) -> _TierTable:
    name = fields.get("name")
    where = f"tier {number} ({name!r})" if isinstance(name, str) else f"tier {number}"
    try:
        _refuse_unknown(fields, list(_TierTable.model_fields))
        return _TierTable.model_validate(fields)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except ValidationError as error:
        raise InputError(f"{where}: {first_invalid(error)}") from error


def _refuse_unknown(fields: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in fields:
        if key not in known:
            raise InputError(f"unknown key {key!r}; known are {', '.join(known)}")


def _shares(tables: Mapping[str, _TierTable]) -> Mapping[str, float]:
    """Each tier's fraction of all clients; equal where the file gives none."""
    shares = {name: table.share for name, table in tables.items() if table.share is not None}
    if not shares:
        return dict.fromkeys(tables, 1 / len(tables))
    without = next((name for name in tables if name not in shares), None)
    if without is not None:
        raise InputError(f"tier {without!r}: share: missing; give every tier one, or none")
    total = math.fsum(shares.values())
    if abs(total - 1) > 1e-6:
        raise InputError(f"share: all shares add up to {total:.9g}; let them add up to 1, or give none")
    return shares


def _selected(select: str | Sequence[str], tables: Mapping[str, _TierTable]) -> Sequence[str]:
    names = [name.strip() for name in select.split(",")] if isinstance(select, str) else list(select)
    known = f"known are {', '.join(tables)}"
    if not names:
        raise InputError(f"no tier is selected; {known}")
    for name in names:
        if name not in tables:
            raise InputError(f"no tier {name!r}; {known}")
        if names.count(name) > 1:
            raise InputError(f"tier {name!r} is selected twice")
    return names
