"""Running the commands as a user does, in an empty folder."""

import io
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from slt_planner.cli import main


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run a command line in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    entries = {"slt": main.slt, "slt-plan": main.slt_plan, "slt-train": main.slt_train}

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as ended:
            entries[words[0]]()
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run


def write_images(folder, split, labels, size=32):
    """A parquet file of PNG images whose colour tells their class."""
    random = np.random.default_rng(len(labels))
    rows = []
    for label in labels:
        pixels = random.integers(0, 120, (size, size, 3), dtype=np.uint8)
        pixels[:, :, label % 3] += 100
        coded = io.BytesIO()
        Image.fromarray(pixels).save(coded, "PNG")
        rows.append({"bytes": coded.getvalue(), "path": "x.png"})
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"img": rows, "label": list(labels)}), folder / f"{split}.parquet")


@pytest.fixture
def images(tmp_path):
    """A small data set in the folder `images`."""
    write_images(tmp_path / "images", "train", [i % 3 for i in range(64)])
    write_images(tmp_path / "images", "test", [i % 3 for i in range(18)])
    return tmp_path / "images"


_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_CHROMIUM_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def browser():
    """The system's Chromium, one for all tests."""
    path = next((found for name in _CHROMIUM if (found := shutil.which(name))), "/usr/bin/chromium")
    if not Path(path).exists():
        pytest.skip("no Chromium on this machine; install the system package to run the browser tests")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=_CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()
