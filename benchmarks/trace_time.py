"""How long the largest networks take to trace, and that their weights are never allocated.

Each network in a fresh process: seconds to build it without weights and to trace it in both modes, and by how much the
process's own peak memory grew, beside the bytes that its weights would take. Run with
``python benchmarks/trace_time.py``.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "trace_time.json"
NETWORKS = ("vit_h_14", "regnet_y_128gf", "efficientnet_b7", "resnet152", "swin_v2_b", "maxvit_t")


def traced(name: str) -> dict[str, object]:
    import torch

    from slt_planner.graph.trace import trace
    from slt_planner.memory.process import peak_resident_bytes
    from slt_planner.models.registry import find_model, load_model

    trace(load_model("resnet20", weights=False), (3, 32, 32))  # what torch imports on first use is not a network's own
    before = peak_resident_bytes()
    began = time.perf_counter()
    model = load_model(name, weights=False)
    built = time.perf_counter()
    graph = trace(model, find_model(name).input_shape)
    return {
        "model": name,
        "input_shape": graph.input_shape,
        "units": graph.depth,
        "weights_bytes": sum(p.nbytes for p in graph.skeleton.parameters()),
        "build_s": round(built - began, 2),
        "trace_s": round(time.perf_counter() - built, 2),
        "process_peak_growth_bytes": peak_resident_bytes() - before,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    from slt_planner.files import write_text

    rows = []
    for name in NETWORKS:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        print(done.stdout, end="", flush=True)
        rows.append(json.loads(done.stdout))
    write_text(RESULT, json.dumps(rows, indent=1) + "\n", force=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(traced(sys.argv[1])))
    else:
        main()
