"""How true predicted memory is: prediction against a measured step, over networks x configurations x steps.

    python benchmarks/memory_accuracy.py [--cases 10] [--models resnet20,vit_b_16] [--out results/memory_accuracy.json]

Every case is drawn at random: a legal (freeze depth, full depth, head scale), a batch from 1 to 128, an optimizer,
precision, layout, norms, threads. The truth is `slt_planner.measure`, which adds up the allocator's own events during a
real step. Beside our prediction stand, on the same step: torchinfo's "estimated total size", the plain sum (weights +
gradients + outputs of all layers), and torch's MemTracker where it runs. A case is left out when its step would need
more than --most-memory or --most-flops. A row is kept a case, so that a run that was stopped goes on where it was.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

# Whose operators were looked at while the predictor was written.
BUILT_WITH = (
    *("resnet20", "resnet152", "vit_b_16", "vit_cifar", "densenet40", "mobilenet_v2"),
    *("resnet56", "resnet110_pad", "vgg9", "convnet", "alexnet", "vgg11_bn", "squeezenet1_1", "googlenet"),
    *("inception_v3", "densenet121", "resnet18", "resnext50_32x4d", "wide_resnet50_2", "mnasnet0_5"),
    *("mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf"),
    *("regnet_x_800mf", "convnext_tiny", "swin_t", "swin_v2_t", "maxvit_t", "vit_b_32", "lraspp_mobilenet_v3_large"),
    *("deeplabv3_mobilenet_v3_large", "r3d_18"),
)
# First met here: others of known families, and families that were not known.
HELD_OUT = (
    *("resnet44", "densenet169", "resnet34", "resnet50", "vgg16", "squeezenet1_0", "mnasnet1_0", "mobilenet_v3_large"),
    *(
        "shufflenet_v2_x1_0",
        "efficientnet_b1",
        "regnet_y_800mf",
        "regnet_x_1_6gf",
        "convnext_small",
        "swin_s",
        "mc3_18",
    ),
    *(
        "timm:ghostnet_100",
        "timm:mixer_s32_224",
        "timm:poolformer_s12",
        "timm:convmixer_768_32",
        "timm:deit_tiny_patch16_224",
    ),
    *("timm:res2net50_26w_4s", "timm:dla34", "timm:hardcorenas_a", "timm:lcnet_050"),
)
MODELS = (*BUILT_WITH, *HELD_OUT)
BATCHES = (1, 2, 3, 4, 8, 16, 24, 32, 64, 128)
PEERS = ("torchinfo", "plain_sum", "mem_tracker")
RESULTS = Path(__file__).parent / "results" / "memory_accuracy.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10, help="cases a network")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--most-memory", type=float, default=3e9, help="bytes of a step")
    parser.add_argument("--most-flops", type=float, default=1.5e11, help="FLOPs of a step")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows_file = args.out.with_suffix(".jsonl")
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
    done = {(row["model"], row["case"]) for row in rows}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SLT_CACHE"] = cache  # calibration starts from nothing
        for name in args.models.split(","):
            for case in range(args.cases):
                if (name, case) not in done:
                    row = run_case(name, case, args)
                    with rows_file.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    rows.append(row)
                    print(told(row), flush=True)
    args.out.write_text(json.dumps(summary(rows, args.device), indent=1) + "\n")
    rows_file.unlink()
    print(json.dumps({k: v for k, v in summary(rows, args.device).items() if k != "cases"}, indent=1))


def run_case(name: str, case: int, args: argparse.Namespace) -> dict:
    import slt_planner as slt
    from slt_planner.models.registry import find_model

    shape = find_model(name).input_shape
    began = time.perf_counter()
    graph = slt.trace(slt.load_model(name, None, shape, weights=False), shape)
    trace_s = time.perf_counter() - began
    config, spec, uncalibrated = draw(graph, random.Random(f"{args.seed} {name} {case}"), args)
    calibration = slt.calibrate(graph, [config], spec)
    began = time.perf_counter()
    predicted = slt.predict(graph, config, spec, details=False)
    predict_s = time.perf_counter() - began
    sub = slt.extract(graph, None, config, spec.norms)
    peers = {"torchinfo": None, "plain_sum": None, **module_sums(sub, graph, spec)}
    peers["mem_tracker"], complaint = mem_tracker(sub, graph, spec)
    began = time.perf_counter()
    measured = slt.measure(sub, spec, details=False)
    return {
        "model": name,
        "case": case,
        "config": config.model_dump(),
        "step": spec.model_dump(),
        "measured_bytes": measured.peak_bytes,
        "predicted_bytes": predicted.peak_bytes,
        "exact": predicted.exact,
        "uncalibrated_bytes": uncalibrated.peak_bytes,
        "uncalibrated_missing": len(uncalibrated.missing),
        "tensor_measured_bytes": measured.tensor_peak_bytes,
        "tensor_predicted_bytes": predicted.tensor_peak_bytes,
        "peers_bytes": peers,
        "mem_tracker_says": complaint,
        "trace_s": round(trace_s, 3),
        "calibrate_s": round(calibration.seconds, 3),
        "operators": calibration.operators,
        "operators_learned": calibration.learned,
        "predict_s": round(predict_s, 4),
        "measure_s": round(time.perf_counter() - began, 3),
    }


def draw(graph, rng: random.Random, args: argparse.Namespace):
    """A random case that is neither too large nor too slow; the uncalibrated prediction comes with it."""
    import slt_planner as slt
    from slt_planner.errors import InputError

    while True:
        full_depth = rng.randint(0, graph.depth)
        config = slt.Config(
            freeze_depth=rng.randint(0, max(0, full_depth - 1)),
            full_depth=full_depth,
            head_scale=rng.choice([1.0, *[rng.choice(graph.head_scales(full_depth)) for _ in range(4)]]),
        )
        optimizer = slt.Optimizer(
            name=rng.choice(["sgd", "adam", "adamw"]),
            momentum=rng.choice([0.0, 0.9, 0.9]),
            weight_decay=rng.choice([0.0, 1e-3]),
            foreach=rng.random() < 0.3,
        )
        spec = slt.StepSpec(
            batch_size=rng.choice(BATCHES),
            optimizer=optimizer,
            precision=rng.choice(["fp32", "fp32", "fp32", "bf16", "autocast"]),
            memory_format=rng.choice(["contiguous", "channels_last"]) if len(graph.input_shape) == 3 else "contiguous",
            norms=rng.choice(["static", "running"]),
            set_to_none=rng.random() < 0.8,
            threads=rng.choice([1, torch.get_num_threads()]),
            device=args.device,
        )
        try:
            profile = slt.predict(graph, config, spec)
        except InputError:  # batch norm over one value
            continue
        flops = sum(row.training_flops for row in profile.units) * spec.batch_size
        if profile.peak_bytes <= args.most_memory and flops <= args.most_flops:
            return config, spec, profile


def module_sums(sub, graph, spec) -> dict:
    """What torchinfo estimates, and the plain sum from its table: weights + gradients + all layers' outputs."""
    import torchinfo

    from slt_planner.memory.step import as_batch

    if spec.precision != "fp32":
        return {}
    batch = as_batch(torch.randn(spec.batch_size, *graph.input_shape), spec)
    info = torchinfo.summary(sub, input_data=graph.adapter.inputs(batch), verbose=0, mode="train", device="cpu")
    trained = sum(p.nbytes for p in sub.parameters() if p.requires_grad)
    return {
        "torchinfo": info.total_input + info.total_output_bytes + info.total_param_bytes,
        "plain_sum": info.total_param_bytes + trained + info.total_output_bytes // 2,
    }


def mem_tracker(sub, graph, spec) -> tuple[int | None, str]:
    """What torch's own tracker says of the second step of this sub-model, or why it says nothing."""
    from torch.distributed._tools.mem_tracker import MemTracker

    import slt_planner as slt
    from slt_planner.memory.step import as_trained, make_optimizer, training_step

    device = torch.device("cuda:0" if spec.device == "cuda" else "cpu")
    module = as_trained(slt.extract(graph, None, sub.extraction.config, spec.norms).to(device), spec)
    optimizer = make_optimizer(module.parameters(), spec.optimizer, 0.0)
    tracker = MemTracker()
    try:
        tracker.track_external(module, optimizer)
        with tracker:
            for _ in range(2):
                tracker.reset_mod_stats()
                with device:
                    batch = torch.randn(spec.batch_size, *graph.input_shape, dtype=next(module.parameters()).dtype)
                    labels = graph.adapter.example_labels(spec.batch_size, graph.num_classes, graph.input_shape)
                training_step(module, optimizer, batch, labels, spec, graph.adapter)
        return tracker.get_tracker_snapshot("peak")[device]["Total"], ""
    except Exception as error:  # whatever it stumbles over is its answer
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def summary(rows: list[dict], device: str) -> dict:
    from slt_planner.environment import environment

    held_out = [row for row in rows if row["model"] not in BUILT_WITH]
    return {
        "what": "predicted minus measured peak of a steady training step, in percent of the measured one",
        "environment": environment(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "built_with": BUILT_WITH,
        "models": len({row["model"] for row in rows}),
        "tensor_ruler": errors(
            [row for row in rows if row["tensor_measured_bytes"] is not None],  # on CUDA it is not measured
            "tensor_predicted_bytes",
            "tensor_measured_bytes",
        ),
        "allocator_ruler": errors(rows, "predicted_bytes", "measured_bytes"),
        "allocator_ruler_held_out_models": errors(held_out, "predicted_bytes", "measured_bytes"),
        "allocator_ruler_adam_or_adamw": errors(
            [row for row in held_out if row["step"]["optimizer"]["name"] != "sgd"], "predicted_bytes", "measured_bytes"
        ),
        "allocator_ruler_bf16_or_autocast": errors(
            [row for row in held_out if row["step"]["precision"] != "fp32"], "predicted_bytes", "measured_bytes"
        ),
        "uncalibrated": errors(rows, "uncalibrated_bytes", "measured_bytes"),
        "peers": {peer: peer_errors(rows, peer) for peer in PEERS},
        "seconds": {
            key: {"median": statistics.median(values), "worst": max(values)}
            for key in ("trace_s", "calibrate_s", "predict_s", "measure_s")
            if (values := [row[key] for row in rows])
        },
        "cases": rows,
    }


def peer_errors(rows: list[dict], peer: str) -> dict:
    answered = [{**row, peer: row["peers_bytes"][peer]} for row in rows if row["peers_bytes"][peer] is not None]
    return {"no_answer": len(rows) - len(answered), **errors(answered, peer, "measured_bytes")}


def errors(rows: list[dict], predicted: str, measured: str) -> dict:
    """Absolute errors in percent, and the share of predictions under the truth."""
    if not rows:
        return {"cases": 0}
    off = sorted(abs(row[predicted] / row[measured] - 1) * 100 for row in rows)
    return {
        "cases": len(rows),
        "not_a_byte_off": sum(row[predicted] == row[measured] for row in rows),
        "median_percent": round(statistics.median(off), 5),
        "percentile_95": round(off[min(len(off) - 1, int(0.95 * len(off)))], 5),
        "worst_percent": round(off[-1], 5),
        "under_the_truth": round(sum(row[predicted] < row[measured] for row in rows) / len(rows), 4),
    }


def told(row: dict) -> str:
    off = (row["predicted_bytes"] / row["measured_bytes"] - 1) * 100
    measured = row["tensor_measured_bytes"]
    tensor = "" if measured is None else f"tensor {row['tensor_predicted_bytes'] - measured:+d} B, "
    where = f"{row['model']} #{row['case']} batch {row['step']['batch_size']}"
    return f"{where}: {row['measured_bytes'] / 1e6:.1f} MB, {tensor}allocator {off:+.4f} %"


if __name__ == "__main__":
    main()
