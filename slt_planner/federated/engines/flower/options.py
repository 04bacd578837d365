"""How long the server waits for its clients, and for how many. No torch, no Flower here."""

from importlib.util import find_spec

from pydantic import Field

from slt_planner.config import Record
from slt_planner.errors import InputError


class FlowerOptions(Record):
    """How long the server waits, and for how many.

    A client that has not answered `deadline_s` seconds after its task was sent is late, and its task expires. With
    fewer than `minimum_answers` updates a round uses none of them. Before the first round, all clients of the run are
    waited for up to `wait_s`; later, when fewer than `minimum_answers` are connected.
    """

    deadline_s: float = Field(default=600.0, gt=0)
    minimum_answers: int = Field(default=1, ge=1)
    wait_s: float = Field(default=120.0, ge=0)


def need_flower() -> None:
    """Refuse to go on without the extra; raises InputError."""
    if find_spec("flwr") is None or find_spec("ray") is None:
        raise InputError('Flower is not installed; pip install "slt-planner[flower]" brings it (Python 3.11 or newer)')
