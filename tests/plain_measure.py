"""The peak of a training step found another way: torch's chrome trace of a plain loop that starts from nothing."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function


def plain_peak(make: Callable[[], nn.Module], batch: int, steps: int = 3, micro_batch: int | None = None) -> int:
    """Highest sum of live bytes in the last step; everything is made inside the recording, so nothing is assumed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model: nn.Module = make()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=1e-3)
        for step in range(steps):
            with record_function(f"plain step {step}"):
                images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
                optimizer.zero_grad()
                loss = backward(model, images, labels, micro_batch)
                optimizer.step()
                del images, labels, loss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"].get("Device Type") == 0]
    (last,) = (e for e in events if e.get("name") == f"plain step {steps - 1}" and e.get("ph") == "X")
    begin, end = last["ts"], last["ts"] + last["dur"]
    memory.sort(key=lambda e: e["ts"])
    live, peak = 0, 0
    for event in memory:
        live += event["args"]["Bytes"]
        if begin <= event["ts"] <= end:
            peak = max(peak, live)
    return peak


def backward(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, micro_batch: int | None, autocast: bool = False
) -> torch.Tensor:
    """Gradients of the mean loss, which is given; in pieces, the mean so far is kept too."""
    if micro_batch is None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss
    mean = torch.zeros(())
    count = -(-len(images) // micro_batch)
    for own, wanted in zip(images.tensor_split(count), labels.tensor_split(count), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(own), wanted)
        loss = loss * (len(own) / len(images))
        loss.backward()
        mean += loss.detach()
        del loss
    return mean
