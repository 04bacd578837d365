"""How long a prediction and a calibration take, what memory they take themselves, and what a memory limit costs.

    python benchmarks/prediction_time.py

Each network twice in a fresh process: with nothing known of this device (cold), and with all its operators known
(warm). "first" is the first prediction of a process, "same" one that was made before, "other" one of a configuration
that this process has not seen and whose operators are known on disk. Growth of the process's own peak memory stands
beside the bytes of the network's weights. The limit's cost is a ratio of step times, with it and without it in turn.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "prediction_time.json"
NETWORKS = {"resnet20": 128, "resnet110": 128, "mobilenet_v2": 8, "vit_b_16": 4, "resnet152": 4}
LIMITED = {"resnet20": (32, 128), "mobilenet_v2": (8,), "vit_b_16": (4,)}


def predictions(name: str, batch: int) -> dict[str, object]:
    import torch

    import slt_planner as slt
    from slt_planner.memory.process import peak_resident_bytes
    from slt_planner.models.registry import find_model

    graph, trace_s = timed(lambda: traced(name))
    slt.predict(
        traced("convnet"), slt.Config.full_network(), slt.StepSpec(batch_size=2)
    )  # torch's imports on first use
    spec, rng = slt.StepSpec(batch_size=batch), random.Random(1)
    configs = [some_config(graph, rng) for _ in range(4)]
    before = peak_resident_bytes()
    _, first_s = timed(lambda: slt.predict(graph, configs[0], spec, details=False))
    predicted = peak_resident_bytes()
    calibration = slt.calibrate(graph, configs, spec)
    calibrated = peak_resident_bytes()
    same_s = [timed(lambda: slt.predict(graph, configs[0], spec, details=False))[1] for _ in range(9)]
    detailed_s = [timed(lambda: slt.predict(graph, configs[0], spec))[1] for _ in range(5)]
    other = subprocess.run(
        [sys.executable, __file__, "other", name, str(batch)], capture_output=True, text=True, check=True
    )
    return {
        "model": name,
        "input_shape": find_model(name).input_shape,
        "batch": batch,
        "weights_bytes": sum(p.nbytes for p in graph.skeleton.parameters()),
        "step_peak_bytes": slt.predict(graph, configs[0], spec).peak_bytes,
        "trace_s": round(trace_s, 3),
        "predict_first_s": round(first_s, 3),
        "predict_same_s": round(statistics.median(same_s), 4),
        "predict_same_with_timeline_s": round(statistics.median(detailed_s), 4),
        "predict_other_s": json.loads(other.stdout),
        "calibrate_4_configs_s": round(calibration.seconds, 2),
        "operators": calibration.operators,
        "operators_learned": calibration.learned,
        "calibrate_largest_operator_bytes": calibration.largest_bytes,
        "process_peak_growth_predicting_bytes": predicted - before,
        "process_peak_growth_calibrating_bytes": calibrated - predicted,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def others(name: str, batch: int) -> list[float]:
    """Predictions of configurations that this process has not seen, all of them calibrated."""
    import slt_planner as slt

    graph, rng = traced(name), random.Random(1)
    warm_up()
    spec = slt.StepSpec(batch_size=batch)
    configs = [some_config(graph, rng) for _ in range(4)]
    timings = [timed(lambda config=config: slt.predict(graph, config, spec, details=False)) for config in configs]
    assert all(profile.exact for profile, _ in timings)
    return [round(seconds, 4) for _, seconds in timings]


def limit_cost(name: str, batch: int, pairs: int = 15) -> dict[str, object]:
    import slt_planner as slt
    from slt_planner.memory.step import SteadyStep

    graph = traced(name)
    spec, config = slt.StepSpec(batch_size=batch), slt.Config.full_network()
    slt.calibrate(graph, [config], spec)
    module = slt.extract(graph, None, config)
    step = SteadyStep(module, spec, graph.input_shape, graph.num_classes, graph.adapter)
    step.prepare()
    limit = slt.memory_limit("100GB", module, step.optimizer)

    def plain() -> None:
        step.run(lambda tensors: None)

    def limited() -> None:
        with limit:
            plain()

    plain(), limited()
    times = [(timed(plain)[1], timed(limited)[1]) for _ in range(pairs)]
    return {
        "model": name,
        "batch": batch,
        "plain_s": round(statistics.median(a for a, _ in times), 4),
        "limited_s": round(statistics.median(b for _, b in times), 4),
        "median_ratio": round(statistics.median(b / a for a, b in times), 3),
        "pairs": pairs,
    }


def warm_up() -> None:
    """What torch imports and keeps on first use is not a prediction's own."""
    import slt_planner as slt

    small, spec = traced("convnet"), slt.StepSpec(batch_size=2)
    slt.calibrate(small, [slt.Config.full_network()], spec)
    slt.predict(small, slt.Config.full_network(), spec)


def traced(name: str):
    import slt_planner as slt
    from slt_planner.models.registry import find_model

    return slt.trace(slt.load_model(name, weights=False), find_model(name).input_shape)


def some_config(graph, rng: random.Random):
    import slt_planner as slt

    full_depth = rng.randint(1, graph.depth)
    scale = rng.choice(graph.head_scales(full_depth))
    return slt.Config(freeze_depth=rng.randint(0, full_depth - 1), full_depth=full_depth, head_scale=scale)


def timed(work: Callable):
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def main() -> None:
    from slt_planner.environment import processor
    from slt_planner.files import write_text

    rows: dict[str, list] = {"predictions": [], "limits": []}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SLT_CACHE"] = cache

        def in_fresh_process(kind: str, name: str, batch: int) -> None:
            done = subprocess.run(
                [sys.executable, __file__, kind, name, str(batch)], capture_output=True, text=True, check=True
            )
            print(done.stdout, end="", flush=True)
            rows[kind].append(json.loads(done.stdout))

        for name, batch in NETWORKS.items():
            in_fresh_process("predictions", name, batch)
        for name, batches in LIMITED.items():
            for batch in batches:
                in_fresh_process("limits", name, batch)
    write_text(RESULT, json.dumps({"processor": processor(), **rows}, indent=1) + "\n", force=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        kind, name, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
        print(json.dumps({"predictions": predictions, "other": others, "limits": limit_cost}[kind](name, batch)))
    else:
        main()
