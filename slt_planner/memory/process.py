"""The process ruler: what a fresh process that does nothing but one training step keeps resident.

Run as a module it is that process: a request as JSON on stdin, the answer as JSON on stdout.
"""

import subprocess
import sys
from pathlib import Path

from slt_planner.config import Config, Granularity, Record, StepSpec
from slt_planner.errors import InputError
from slt_planner.memory.profile import ProcessMemory


class _Request(Record):
    model: str
    config: Config
    spec: StepSpec
    input_shape: tuple[int, ...]
    num_classes: int | None
    granularity: Granularity


def measure_process(
    model: str,
    config: Config,
    spec: StepSpec,
    input_shape: tuple[int, ...],
    num_classes: int | None = None,
    granularity: Granularity = "layer",
) -> ProcessMemory:
    """The resident set of a fresh process before and during a steady step of a sub-model: interpreter and libraries
    included, so it is the number to hold against a phone's or a container's limit.

    Args:
        model: what `load_model` takes by name; the fresh process makes the network itself.
        config: what is frozen, trained at full width, and scaled.
        spec: the step; on CPU.
        input_shape: of one sample.
        num_classes: outputs of the network; None is its own number.
        granularity: of the units that the configuration counts.

    Raises:
        InputError: the step is not on CPU, or the process failed; the message is its last line.
    """
    if spec.device != "cpu":
        raise InputError(f"the process ruler is for steps on cpu, not on {spec.device}")
    request = _Request(
        model=model,
        config=config,
        spec=spec,
        input_shape=input_shape,
        num_classes=num_classes,
        granularity=granularity,
    )
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=request.model_dump_json(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise InputError(f"the step in a process of its own failed: {last}")
    return ProcessMemory.model_validate_json(done.stdout)


def _answer(request: _Request) -> ProcessMemory:
    from slt_planner.graph.trace import trace
    from slt_planner.memory.step import SteadyStep, as_trained, threads
    from slt_planner.models.registry import load_model
    from slt_planner.submodel.extract import extract

    network = load_model(request.model, request.num_classes, request.input_shape, weights=False)
    graph = trace(network, request.input_shape, granularity=request.granularity)
    before = resident_bytes()
    with threads(request.spec):
        module = as_trained(extract(graph, None, request.config, request.spec.norms), request.spec)
        step = SteadyStep(module, request.spec, graph.input_shape, graph.num_classes, graph.adapter)
        step.prepare()
        step.run(lambda tensors: None)
    return ProcessMemory(before_bytes=before, peak_bytes=peak_resident_bytes())


def resident_bytes() -> int:
    """What this process keeps resident now; where there is no /proc, the most that it has.

    >>> 0 < resident_bytes() <= peak_resident_bytes()
    True
    """
    return _resident_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """The most that this process has kept resident so far."""
    return _resident_bytes("VmHWM")


def _resident_bytes(which: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(which))
        return int(line.split()[1]) * 1024
    import resource  # not on every system; what it says is at least what the process that started this one had

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    print(_answer(_Request.model_validate_json(sys.stdin.read())).model_dump_json())
