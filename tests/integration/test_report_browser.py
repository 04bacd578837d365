"""Reports in a real browser: they load without the network, show their charts, and fit a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slt_planner.config import DeviceFigures
from slt_planner.reporting.html import plan_report, run_report
from tests.unit.sample_records import as_predicted, on_devices, sample_plan, sample_run

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_CHROMIUM = next((path for name in _NAMES if (path := shutil.which(name))), None) or (
    "/usr/bin/chromium" if Path("/usr/bin/chromium").exists() else None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        _CHROMIUM is None, reason="no Chromium on this machine; install the system package to run the browser tests"
    ),
]
_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=_CHROMIUM, args=_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    plan = sample_plan(infeasible_mb=16)
    unkind = sample_plan((64, 256), name="<script>alert(1)</script>" * 40, tier_names=("n" * 10_000, "$x$ 🦊"))
    phone = DeviceFigures(flops_per_s=5e9, upload_bytes_per_s=1e6, download_bytes_per_s=4e6, power_w=3, link_power_w=2)
    devices = on_devices(
        sample_plan((64, 100, 128), infeasible_mb=16, policy="per-tier"), {"64MB": phone, "100MB": phone}
    )
    runs = [
        sample_run(plan=plan),
        sample_run("small", plan=plan),
        sample_run(plan=plan, seed=1, finished_rounds=9),
    ]
    command = "slt-plan resnet20 " + "--a-long-option value " * 20
    plan_report(plan, folder / "plan.html", command=command)
    plan_report(unkind, folder / "unkind.html", command=command)
    plan_report(as_predicted(devices), folder / "devices.html", command=command)
    run_report(runs, folder / "runs.html", command=command)
    return {name: folder / f"{name}.html" for name in ("plan", "unkind", "devices", "runs")}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 380])
@pytest.mark.parametrize("name", ["plan", "unkind", "devices", "runs"])
def test_page_shows_its_charts_and_fits(
    browser: Any, reports: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_offline(True)
    page = context.new_page()
    troubles: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(reports[name].as_uri())
    assert troubles == []
    assert requests == [reports[name].as_uri()]
    charts = page.locator("figure svg").all()
    assert len(charts) >= 2
    for chart in charts:
        box = chart.bounding_box()
        assert box["width"] > 300
        assert box["height"] > 50
        assert chart.get_attribute("role") == "img"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.body.scrollWidth") <= width
    context.close()


def luminance(colour: str) -> float:
    """Relative luminance of a CSS colour "rgb(r, g, b)" (WCAG 2.1)."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(*colours: str) -> float:
    """The contrast ratio of two CSS colours (WCAG 2.1)."""
    darker, lighter = sorted(map(luminance, colours))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_in_charts_stands_out_in_both_themes(browser: Any, reports: dict[str, Path], scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(reports["plan"].as_uri())
    paper = page.evaluate("getComputedStyle(document.querySelector('figure')).backgroundColor")
    assert (luminance(paper) > 0.9) if scheme == "light" else (luminance(paper) < 0.05)
    fills = page.evaluate(
        "[...document.querySelectorAll('#memory-0 svg text')].map(text => getComputedStyle(text).fill)"
    )
    assert fills
    assert all(contrast(fill, paper) >= 4.5 for fill in fills)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_trade_offs_numbers_stand_out_on_their_cells_and_its_labels_beside_them(
    browser: Any, reports: dict[str, Path], scheme: str
) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(reports["plan"].as_uri())
    paper = page.evaluate("getComputedStyle(document.querySelector('figure')).backgroundColor")
    cells = page.evaluate(
        "[...document.querySelectorAll('#trade-off [id*=QuadMesh] path')].map(cell => getComputedStyle(cell).fill)"
    )
    fills = page.evaluate(
        "[...document.querySelectorAll('#trade-off svg text')].map(text => getComputedStyle(text).fill)"
    )
    assert len(cells) == 80
    numbers = [fill for fill in fills if all(contrast(fill, cell) >= 4.5 for cell in cells)]
    labels = [fill for fill in fills if contrast(fill, paper) >= 4.5]
    assert len(numbers) >= 80
    assert set(numbers) | set(labels) == set(fills)
    page.close()


def test_numbers_behind_a_chart_open(browser: Any, reports: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(reports["runs"].as_uri())
    table = page.locator("#accuracy-data")
    assert not table.is_visible()
    page.locator("summary").first.click()
    assert table.is_visible()
    page.close()
