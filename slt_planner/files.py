"""Files are written whole or not at all: to a temporary name first, then renamed."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from slt_planner.errors import InputError, first_invalid

_RecordT = TypeVar("_RecordT", bound=BaseModel)


def refuse_existing(paths: Iterable[str | Path]) -> None:
    """Refuse to overwrite.

    Raises:
        InputError: one of the paths exists.
    """
    for path in paths:
        with _told(path):
            exists = Path(path).exists()
        if exists:
            raise InputError(f"{path} exists; choose another name, or --force to overwrite it")


def check_writable(paths: Iterable[str | Path]) -> None:
    """Try, before long work, whether files can be written later; nothing is left behind.

    Raises:
        InputError: one of the paths is a folder, or nothing can be written where it would be.
    """
    for path in map(Path, paths):
        with _told(path):
            if path.is_dir():
                raise InputError(f"{path} is a folder; give the name of a file")
            folder = next(parent for parent in path.absolute().parents if parent.exists())
            with tempfile.TemporaryFile(dir=folder):
                pass


def write_bytes(path: str | Path, content: bytes, force: bool = False) -> None:
    """Write a file under a temporary name and rename it; make its folder if needed.

    Raises:
        InputError: the file exists and `force` is False, or it cannot be written.
    """
    path = Path(path)
    if not force:
        refuse_existing([path])
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
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


def write_text(path: str | Path, content: str, force: bool = False) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, content.encode("utf-8"), force=force)


def append_text(path: Path, content: str) -> None:
    """Add to the end of a file, in UTF-8; raises InputError if that cannot be done."""
    with _told(path), path.open("a", encoding="utf-8") as file:
        file.write(content)


def read_text(path: str | Path, what: str, advice: str) -> str:
    """A file's text, from UTF-8; `what` it is called and advice for who has none go into errors.

    Raises:
        InputError: it is missing, or not text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{what} {path}: cannot be read ({reason}); {advice}") from error


def read_record(path: str | Path, record: type[_RecordT], what: str, made_with: str) -> _RecordT:
    """Read and check a record from a JSON file; `what` it is called and the command that makes one go into errors.

    Raises:
        InputError: missing, not JSON, or not a valid record; the message names the first offending field.
    """
    text = read_text(path, what, f"make one with {made_with}")
    try:
        return record.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise InputError(f"{what} {path}: not JSON (line {error.lineno}: {error.msg})") from error
    except ValidationError as error:
        raise InputError(f"{what} {path}: {first_invalid(error)}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise InputError(f"{what} {path}: not a {what} ({str(error).splitlines()[0]})") from error


@contextmanager
def _told(path: str | Path) -> Iterator[None]:
    """Errors of the file system become one line that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
