"""What a round costs a client in time and energy: estimates, by the formulas of docs/costs.md. No torch here."""

from slt_planner.config import DeviceFigures, Record
from slt_planner.planning.plan import Plan, TierStage


class RoundCost(Record):
    """A client's estimated seconds and joules in one round; None where a figure of its device is unknown."""

    compute_s: float | None
    transfer_s: float | None
    compute_j: float | None
    transfer_j: float | None

    @property
    def round_s(self) -> float | None:
        """Training and both transfers, one after the other."""
        return _sum(self.compute_s, self.transfer_s)

    @property
    def energy_j(self) -> float | None:
        """The energy of the whole device during that time."""
        return _sum(self.compute_j, self.transfer_j)


def round_cost(device: DeviceFigures, train_flops: float, upload_bytes: int, download_bytes: int | None) -> RoundCost:
    """Time and energy of one client's round: work over throughput, bytes over link speed, power times time.

    Args:
        device: the client's figures; a Tier is one.
        train_flops: arithmetic of the whole round, a multiply and an add counted as two.
        upload_bytes: what it sends.
        download_bytes: what it gets; None if unknown.

    >>> phone = DeviceFigures(flops_per_s=20e9, upload_bytes_per_s=1e6, download_bytes_per_s=4e6, power_w=3.0)
    >>> cost = round_cost(phone, train_flops=100e9, upload_bytes=500_000, download_bytes=1_000_000)
    >>> cost.compute_s, cost.transfer_s, cost.compute_j, cost.energy_j is None  # its link power is unknown
    (5.0, 0.75, 15.0, True)
    """
    compute_s = _over(train_flops, device.flops_per_s)
    transfer_s = _sum(
        _over(upload_bytes, device.upload_bytes_per_s), _over(download_bytes, device.download_bytes_per_s)
    )
    return RoundCost(
        compute_s=compute_s,
        transfer_s=transfer_s,
        compute_j=_product(device.power_w, compute_s),
        transfer_j=_product(device.link_power_w, transfer_s),
    )


def stage_cost(
    stage: TierStage, device: DeviceFigures, samples: int, local_epochs: int = 1, held_bytes: int = 0
) -> RoundCost:
    """`round_cost` of a plan's stage.

    Args:
        stage: one tier's stage.
        device: the client's figures; a Tier is one.
        samples: a client's training samples.
        local_epochs: how often it goes through them in a round.
        held_bytes: what it already has of the download: 0 at its first selection in the stage, later
            `unchanging_bytes`.
    """
    download_bytes = None if stage.download_bytes is None else stage.download_bytes - held_bytes
    return round_cost(device, stage.train_flops_per_sample * samples * local_epochs, stage.upload_bytes, download_bytes)


def unchanging_bytes(plan: Plan, stage: int) -> int | None:
    """Bytes of a download that stay as they are during stage number `stage` (from 0): what every tier freezes.

    A unit that one tier freezes and a stronger one trains changes in every round. Frozen units are at full width, so
    those of the tier that freezes least are the same tensors for all. None if the plan does not say what is sent.
    """
    frozen = [tier.stages[stage].frozen_bytes for tier in plan.feasible_tiers]
    known = [size for size in frozen if size is not None]
    return min(known) if len(known) == len(frozen) else None


def _over(amount: float | None, rate: float | None) -> float | None:
    return None if amount is None or rate is None else amount / rate


def _product(power_w: float | None, time_s: float | None) -> float | None:
    return None if power_w is None or time_s is None else power_w * time_s


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second
