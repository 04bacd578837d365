"""Files are written whole or not at all: to a temporary name first, then renamed."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from slt_planner.errors import InputError


def refuse_existing(paths: Iterable[str | Path]) -> None:
    """Refuse to overwrite.

    Raises:
        InputError: one of the paths exists.
    """
    for path in paths:
        if Path(path).exists():
            raise InputError(f"{path} exists; choose another name, or --force to overwrite it")


def write_bytes(path: str | Path, content: bytes, force: bool = False) -> None:
    """Write a file under a temporary name and rename it; make its folder if needed.

    Raises:
        InputError: the file exists and `force` is False, or it cannot be written.
    """
    path = Path(path)
    if not force:
        refuse_existing([path])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp's own mode is for the owner alone
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def write_text(path: str | Path, content: str, force: bool = False) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, content.encode("utf-8"), force=force)
