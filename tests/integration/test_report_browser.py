"""Reports in a real browser: they load without the network, show their charts, and fit a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slt_planner.reporting.html import plan_report, run_report
from tests.unit.sample_records import sample_plan, sample_run

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
    runs = [
        sample_run(plan=plan),
        sample_run("small", plan=plan),
        sample_run(plan=plan, seed=1, finished_rounds=9),
    ]
    command = "slt-plan resnet20 " + "--a-long-option value " * 20
    plan_report(plan, folder / "plan.html", command=command)
    plan_report(unkind, folder / "unkind.html", command=command)
    run_report(runs, folder / "runs.html", command=command)
    return {name: folder / f"{name}.html" for name in ("plan", "unkind", "runs")}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 380])
@pytest.mark.parametrize("name", ["plan", "unkind", "runs"])
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_in_charts_stands_out_in_both_themes(browser: Any, reports: dict[str, Path], scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(reports["plan"].as_uri())
    paper = luminance(page.evaluate("getComputedStyle(document.querySelector('figure')).backgroundColor"))
    assert (paper > 0.9) if scheme == "light" else (paper < 0.05)
    script = "[...document.querySelectorAll('#memory-0 svg text')].map(text => getComputedStyle(text).fill)"
    fills = page.evaluate(script)
    assert fills
    for fill in fills:
        lighter, darker = sorted((luminance(fill), paper), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5
    page.close()


def test_numbers_behind_a_chart_open(browser: Any, reports: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(reports["runs"].as_uri())
    table = page.locator("#accuracy-data")
    assert not table.is_visible()
    page.locator("summary").first.click()
    assert table.is_visible()
    page.close()
