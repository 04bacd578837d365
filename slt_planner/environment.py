"""What a measurement was made on; written into every result."""

import hashlib
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

from slt_planner import __version__


def environment(threads: int) -> dict[str, str]:
    """Versions, processor and threads, as text."""
    return {
        "slt_planner": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": str(threads),
    }


@cache
def source_digest() -> str:
    """Tells one state of this package's code from another."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return digest("\0".join(source.read_text(encoding="utf-8") for source in sources))


def digest(text: str) -> str:
    """A short name of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
