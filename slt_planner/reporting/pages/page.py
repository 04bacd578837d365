"""From a template to one self-contained file: style, script, data and plotly.js are inside."""

import base64
import gzip
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from slt_planner.memory.profile import CATEGORIES
from slt_planner.reporting.words import NOTHING, percent, reason_text, scale_text, shorten
from slt_planner.units import format_bytes

PROOFS = {"wider_head": "a head one notch wider", "less_frozen": "one unit less frozen"}


def render(template: str, context: Mapping[str, Any]) -> str:
    """A page; whatever comes from records is escaped, in HTML and in the data of charts."""
    environment = Environment(
        loader=PackageLoader("slt_planner.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {
        "bytes": format_bytes,
        "operations": operations,
        "percent": percent,
        "prefixed": "<{}".format,
        "reason": reason_text,
        "rough": rough,
        "scale": scale_text,
        "shorten": shorten,
        "unbroken": unbroken,
    }
    script = files("slt_planner.reporting").joinpath("templates/page.js").read_text(encoding="utf-8")
    environment.globals |= {
        "CATEGORIES": CATEGORIES,
        "NOTHING": NOTHING,
        "PROOFS": PROOFS,
        "script": script,
        "plotly": _plotly(),
        "policy": _policy(script),
    }
    page = environment.get_template(template).render(context)
    return page.encode("utf-8", "replace").decode("utf-8")  # a command line can hold bytes that are no text


@cache
def _plotly_source() -> str:
    return files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    """plotly.js, compressed: the page's script unpacks it."""
    return base64.b64encode(gzip.compress(_plotly_source().encode(), 9, mtime=0)).decode("ascii")


def _policy(script: str) -> str:
    """A Content-Security-Policy: nothing but these two scripts runs, and nothing is loaded."""
    hashes = (hashlib.sha256(source.encode()).digest() for source in (script, _plotly_source()))
    scripts = " ".join(f"'sha256-{base64.b64encode(own).decode()}'" for own in hashes)
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {scripts}"


def operations(number: int) -> str:
    """A number of operations for people.

    >>> operations(40_551_424)
    '40.6 M'
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def rough(number: float) -> str:
    """An estimate for people: two decimal places, fewer where it is large.

    >>> rough(0.0502), rough(29.74), rough(5400.4), rough(0.0002)
    ('0.05', '29.7', '5,400', '<0.01')
    """
    if number < 0.01:
        return "<0.01"
    return f"{number:,.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def unbroken(sentence: str) -> str:
    """A sentence whose numbers stay with their units where it wraps.

    >>> unbroken("within 16.0 MB, tightest 99.8 %")
    'within 16.0\\xa0MB, tightest 99.8\\xa0%'
    """
    return re.sub(r"(?<=\d) (?=%|[kMG]?B\b)", "\u00a0", sentence)


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A record's fields, those of records inside it too, as words."""
    found: dict[str, str] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name} ")
        else:
            found[f"{prefix}{name}".replace("_", " ")] = _field_words(value)
    return found


def _field_words(value: Any) -> str:
    if value is None or value == ():
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def side_by_side(records: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, Any]:
    """Columns' names, and a row a field; one column for all where the records are equal."""
    if all(record == records[0][1] for _, record in records):
        records = [("value" if len(records) == 1 else "all", records[0][1])]
    fields = dict.fromkeys(field for _, record in records for field in record)
    return {
        "columns": [f"<{shorten(label, 30)}" for label, _ in records],
        "rows": [(field, [record.get(field, NOTHING) for _, record in records]) for field in fields],
    }
