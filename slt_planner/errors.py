"""The errors users can meet; each carries the exit code the commands end with."""

from pydantic import ValidationError


def first_invalid(error: ValidationError) -> str:
    """The first field of a record that is wrong, and why, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}{more}" if where else f"{message}{more}"


class SltError(Exception):
    """Base of all errors that are told to the user in one line."""

    exit_code = 1


class InputError(SltError, ValueError):
    """Something the user gave is wrong: the message says what, where, and what would be right."""

    exit_code = 2


class UnsupportedLayerError(InputError):
    """The network holds a layer or operation that has no width rule; nothing is guessed."""


class BudgetExceeded(SltError):  # noqa: N818 - the name is part of the public API
    """A training step would need more memory than its limit; raised before the operator that would."""

    exit_code = 3

    def __init__(
        self, operator: str, unit: str, asked_bytes: int, live_bytes: int, budget_bytes: int, calibrated: bool
    ) -> None:
        self.operator, self.unit = operator, unit
        self.asked_bytes, self.live_bytes, self.budget_bytes = asked_bytes, live_bytes, budget_bytes
        self.calibrated = calibrated
        where = f"{operator} in {unit}" if unit else operator
        over = live_bytes + asked_bytes - budget_bytes
        unknown = "" if calibrated else "; its scratch memory is not known here (calibrate), it comes on top"
        super().__init__(
            f"{where} asks for {asked_bytes:,} bytes while {live_bytes:,} are alive: "
            f"{over:,} over the budget of {budget_bytes:,}{unknown}"
        )

    def __reduce__(self) -> tuple[type["BudgetExceeded"], tuple[str, str, int, int, int, bool]]:
        """So that it comes whole out of a worker."""
        own = self.operator, self.unit, self.asked_bytes, self.live_bytes, self.budget_bytes, self.calibrated
        return BudgetExceeded, own


class InfeasibleError(SltError):
    """No tier's budget admits a schedule."""

    exit_code = 3
