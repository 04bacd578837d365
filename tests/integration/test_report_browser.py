"""Reports in a real browser: they load without the network, draw their charts, fit a phone, print, and do no harm."""

import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slt_planner.config import DeviceFigures
from slt_planner.files import write_text
from slt_planner.planning.plan import Plan
from slt_planner.reporting.html import plan_report, plans_report, run_report
from slt_planner.reporting.pages.plan import plan_page
from tests.unit.sample_records import also_predicted, as_predicted, on_devices, sample_plan, sample_run
from tests.unit.test_charts import profile_with_timeline, what_if

pytestmark = pytest.mark.browser

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"  # of the last run of these tests, to be looked at
DRAWN = "html[data-charts=drawn]"
UNKIND = ["<script>alert(1)</script>" * 40, "n" * 10_000, "$x$ 🦊 \"'`", "</script><img src=x onerror=alert(1)>"]
COMMAND = "slt-plan resnet20 " + "--a-long-option value " * 20


def with_unit_names(plan: Plan, names: list[str]) -> Plan:
    """A plan whose first units are called so."""
    fields = json.loads(plan.model_dump_json())
    for unit, name in zip(fields["full_network"]["units"], names, strict=False):
        unit["name"] = unit["kind"] = name
    return plan.model_validate(fields)


def deep_plan(depth: int = 200) -> Plan:
    """A plan of as many units, each with a stage of its own, for three tiers, with a long timeline."""
    fields = json.loads(also_predicted(sample_plan(), 4096).model_dump_json())
    fields["model"]["unit_names"] = [f"layer{number}.conv" for number in range(depth)]
    unit = fields["full_network"]["units"][3]
    fields["full_network"]["units"] = [unit | {"index": n + 1, "name": f"layer{n}.conv"} for n in range(depth)]
    timeline = profile_with_timeline(4000)
    fields["full_network"] |= {
        "timeline": [point.model_dump() for point in timeline.timeline],
        "resident": timeline.resident,
    }
    stage = fields["stages"][5] | {"limited_by": "budget", "rounds_fraction": 1 / depth}
    fields["stages"] = [stage | {"full_depth": n + 1} for n in range(depth)]
    for tier in fields["tiers"]:
        own, proof = tier["stages"][5], (tier["proofs"] or [None])[0]
        tier["stages"] = [own | {"full_depth": n + 1, "freeze_depth": n} for n in range(depth)]
        tier["proofs"] = [proof | {"stage": n} for n in range(depth)] if proof else []
    return Plan.model_validate(fields)


@pytest.fixture(scope="module")
def plan() -> Plan:
    plan = also_predicted(sample_plan(infeasible_mb=16), off=4096)
    return plan.model_copy(update={"full_network": profile_with_timeline(50), "what_if": what_if()})


@pytest.fixture(scope="module")
def reports(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    unkind = with_unit_names(sample_plan((64, 256), name=UNKIND[0], tier_names=(UNKIND[1], UNKIND[2])), UNKIND)
    phone = DeviceFigures(flops_per_s=5e9, upload_bytes_per_s=1e6, download_bytes_per_s=4e6, power_w=3, link_power_w=2)
    per_tier = sample_plan((64, 100, 128), infeasible_mb=16, policy="per-tier")
    devices = as_predicted(on_devices(per_tier, {"64MB": phone, "100MB": phone}))
    runs = [
        sample_run(plan=plan),
        sample_run(plan=plan, seed=1),
        sample_run("small", plan=plan),
        sample_run(plan=plan, seed=2, finished_rounds=9),
    ]
    plan_report(plan, folder / "plan.html", command=COMMAND)
    plan_report(unkind, folder / "unkind.html", command=COMMAND + UNKIND[3])
    write_text(folder / "deep.html", plan_page(deep_plan(), command=None))
    plans_report([plan, devices, unkind], folder / "plans.html", command=COMMAND)
    run_report(runs, folder / "runs.html", command=COMMAND)
    run_report([sample_run(plan=unkind, dataset_title=UNKIND[3])], folder / "unkind-run.html")
    names = ("plan", "unkind", "deep", "plans", "runs", "unkind-run")
    return {name: folder / f"{name}.html" for name in names}


@contextmanager
def opened(browser: Any, path: Path, width: int = 1200, scheme: str = "light", **settings: Any) -> Iterator[Any]:
    """A page with all its charts drawn, that asked for nothing but itself and complained of nothing."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **settings)
    context.set_offline(True)
    page = context.new_page()
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    page.on("request", lambda request: troubles.append(request.url[:200]))
    page.goto(path.as_uri())
    assert [trouble for trouble in troubles if trouble != path.as_uri()] == []
    page.wait_for_selector(DRAWN, state="attached")
    yield page
    assert [trouble for trouble in troubles if trouble != path.as_uri()] == []
    context.close()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (380, "dark")])
@pytest.mark.parametrize("name", ["plan", "unkind", "plans", "runs", "unkind-run"])
def test_page_draws_its_charts_and_fits(
    browser: Any, reports: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    with opened(browser, reports[name], width, scheme) as page:
        charts = page.locator("figure > .chart").all()
        assert len(charts) >= 3
        for chart in charts:
            assert chart.get_attribute("role") == "img"
            assert len(chart.get_attribute("aria-label")) > 20
            box, drawing = chart.bounding_box(), chart.locator("svg.main-svg").first.bounding_box()
            assert drawing["width"] == pytest.approx(box["width"], abs=1)
            assert drawing["width"] > 250
            assert drawing["height"] > 100
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.body.scrollWidth") <= width
        page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{scheme}.png", full_page=True)


def test_numbers_on_the_page_are_those_of_the_record(browser: Any, plan: Plan, reports: dict[str, Path]) -> None:
    with opened(browser, reports["plan"]) as page:
        bars = page.evaluate(
            "[...document.querySelector('#memory-0 .chart').data]"
            ".filter(trace => trace.type === 'bar' && !trace.marker.opacity).map(trace => [...trace.y])"
        )
        drawn = [sum(heights) for heights in zip(*bars, strict=True)]
        measured = [stage.measured_peak_bytes for stage in plan.feasible_tiers[0].stages]
        assert [round(1e6 * height) for height in drawn] == measured
        cells = page.evaluate(
            "[...document.querySelectorAll('#stages tbody tr')].map(row => Number(row.cells[6].dataset.value))"
        )
        assert cells == measured


@pytest.mark.parametrize(
    ("name", "chart", "target", "words"),
    [
        ("plan", "schedule", ".bars path >> nth=30", "stage"),
        ("plan", "memory-0", ".bars path >> nth=50", "of the budget"),
        ("plan", "trade-off", ".heatmaplayer image", "frozen, head"),
        ("plan", "timeline", ".nsewdrag", "activations"),
        ("runs", "accuracy", ".point >> nth=2", "uploaded"),
        ("runs", "confusion-0", ".heatmaplayer image", "taken for"),
        ("runs", "split-0", ".heatmaplayer image", "images"),
    ],
)
def test_pointing_at_a_chart_shows_what_it_is(
    pages: dict[str, Any], name: str, chart: str, target: str, words: str
) -> None:
    page = pages[name]
    page.locator(f"#{chart}").scroll_into_view_if_needed()
    box = page.locator(f"#{chart} {target}").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 2, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    label = page.locator(f"#{chart} .hoverlayer .hovertext").first
    label.wait_for()
    assert words in label.text_content()
    page.mouse.move(0, 0)


@pytest.fixture(scope="module")
def pages(browser: Any, reports: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Open pages that tests which leave no trace share."""
    with opened(browser, reports["plan"]) as plan_page, opened(browser, reports["runs"]) as run_page:
        yield {"plan": plan_page, "runs": run_page}


def column(page: Any, table: str, number: int) -> list[str]:
    """What can be seen of a table's column."""
    cells = page.locator(f"#{table} tbody tr:not([hidden]) td:nth-child({number})")
    return [text.strip() for text in cells.all_text_contents()]


def test_units_are_sorted_by_a_title_and_searched(browser: Any, plan: Plan, reports: dict[str, Path]) -> None:
    units = plan.full_network.units
    with opened(browser, reports["plan"]) as page:
        title = page.locator("#units thead th", has_text="activations")
        title.get_by_role("button").focus()
        page.keyboard.press("Enter")
        assert title.get_attribute("aria-sort") == "ascending"
        ascending = sorted(units, key=lambda unit: unit.activations_bytes)
        assert column(page, "units", 1) == [str(unit.index) for unit in ascending]
        page.keyboard.press("Enter")
        assert title.get_attribute("aria-sort") == "descending"
        descending = sorted(units, key=lambda unit: -unit.activations_bytes)
        assert column(page, "units", 1) == [str(unit.index) for unit in descending]
        page.locator("#units thead th", has_text="name").get_by_role("button").click()
        assert title.get_attribute("aria-sort") == "none"
        page.get_by_label("Search units").fill("LAYER2")
        found = [unit.name for unit in units if "layer2" in unit.name]
        assert column(page, "units", 2) == sorted(found)
        assert page.locator("[data-noun=units]").text_content() == f"{len(found)} of {len(units)} units"
        page.get_by_label("Search units").fill("")
        assert len(column(page, "units", 1)) == len(units)


def test_charts_offer_nothing_that_needs_the_network_and_are_no_stops_of_the_tab_key(pages: dict[str, Any]) -> None:
    page = pages["plan"]
    titles = page.locator("#schedule .modebar-btn").evaluate_all("all => all.map(own => own.dataset.title)")
    stops = page.locator(".chart :is(button, a, [tabindex]):not([tabindex='-1'])").count()
    assert titles == ["Download plot as a PNG", "Zoom", "Pan", "Reset axes"]
    assert stops == 0


def test_the_table_can_be_copied(browser: Any, reports: dict[str, Path]) -> None:
    with opened(browser, reports["runs"], permissions=["clipboard-read", "clipboard-write"]) as page:
        for name, suffix in (("CSV", "csv"), ("Markdown", "md"), ("LaTeX", "tex")):
            page.get_by_role("button", name=name, exact=True).click()
            page.get_by_text(f"Copied as {name}.").wait_for()
            copied = page.evaluate("navigator.clipboard.readText()")
            assert copied == reports["runs"].with_suffix(f".{suffix}").read_text(encoding="utf-8")


def test_numbers_behind_a_chart_open(browser: Any, reports: dict[str, Path]) -> None:
    with opened(browser, reports["runs"]) as page:
        table = page.locator("#accuracy-data")
        assert not table.is_visible()
        page.locator("summary").first.click()
        assert table.is_visible()


def luminance(colour: str) -> float:
    """Relative luminance of a CSS colour "rgb(r, g, b)" (WCAG 2.1)."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(*colours: str) -> float:
    """The contrast ratio of two CSS colours (WCAG 2.1)."""
    darker, lighter = sorted(map(luminance, colours))
    return (lighter + 0.05) / (darker + 0.05)


def fills(page: Any, selector: str) -> set[str]:
    """The colours of the texts or shapes that a selector finds."""
    return set(page.evaluate(f"[...document.querySelectorAll('{selector}')].map(own => getComputedStyle(own).fill)"))


PAPER = "getComputedStyle(document.querySelector('figure')).backgroundColor"
AXES = ":is(.xtick, .ytick, .legendtext, .xtitle, .ytitle)"


def test_charts_follow_the_theme_while_the_page_is_open_and_are_readable_in_both(
    browser: Any, reports: dict[str, Path]
) -> None:
    with opened(browser, reports["plan"]) as page:
        papers = {}
        for scheme in ("light", "dark", "light"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(200)
            paper = papers[scheme] = page.evaluate(PAPER)
            for chart in ("schedule", "memory-0", "trade-off", "timeline", "what-if", "unit-memory"):
                texts = fills(page, f"#{chart} {AXES} text, #{chart} text{AXES}")
                assert texts, chart
                assert all(contrast(text, paper) >= 4.5 for text in texts), (chart, scheme, texts)
            (numbers,) = fills(page, "#trade-off .textpoint text")
            assert contrast(numbers, "rgb(129, 149, 184)") >= 4.5, "on the darkest cell"
        assert luminance(papers["light"]) > 0.9
        assert luminance(papers["dark"]) < 0.05


def test_a_page_prints_on_white_paper_with_its_charts(browser: Any, reports: dict[str, Path], tmp_path: Path) -> None:
    with opened(browser, reports["plan"], scheme="dark") as page:
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        page.wait_for_timeout(300)
        assert page.evaluate(PAPER) == "rgb(255, 255, 255)"
        texts = fills(page, f"#memory-0 {AXES} text, #memory-0 text{AXES}")
        assert all(contrast(text, "rgb(255, 255, 255)") >= 4.5 for text in texts)
        widths = page.evaluate("[...document.querySelectorAll('svg.main-svg')].map(own => own.clientWidth)")
        assert max(widths) <= 700
        assert not page.locator(".search").first.is_visible()
        page.pdf(path=tmp_path / "plan.pdf", format="A4")
        assert (tmp_path / "plan.pdf").stat().st_size > 30_000
        page.emulate_media(media="screen")
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        page.wait_for_timeout(300)
        assert luminance(page.evaluate(PAPER)) < 0.05
        assert page.locator("#schedule svg.main-svg").first.bounding_box()["width"] > 800


def test_names_are_shown_as_they_were_typed(browser: Any, reports: dict[str, Path]) -> None:
    with opened(browser, reports["unkind"]) as page:
        page.locator("#unit-memory").scroll_into_view_if_needed()
        box = page.locator("#unit-memory .trace.bars").last.locator("path").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2 + 2, box["y"] + box["height"] / 2)
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        label = page.locator("#unit-memory .hovertext").first
        label.wait_for()
        assert "<script>alert(1)</script>" in label.text_content()
        assert page.locator("img, main script:not([type])").count() == 0
        assert column(page, "units", 2)[2] == UNKIND[2]


def test_a_network_of_200_layers_opens_quickly(browser: Any, reports: dict[str, Path]) -> None:
    assert reports["deep"].stat().st_size < 8_000_000
    began = time.perf_counter()
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.goto(reports["deep"].as_uri())
    page.wait_for_selector("#schedule .chart[data-drawn]")
    seconds = time.perf_counter() - began
    page.wait_for_selector(DRAWN, state="attached")
    page.close()
    assert seconds < 10, "2 s where the machine has nothing else to do"


def test_without_a_way_to_unpack_charts_the_tables_are_open(browser: Any, reports: dict[str, Path]) -> None:
    page = browser.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(reports["plan"].as_uri())
    page.locator("#no-charts").wait_for()
    assert page.locator("#memory-0-data").is_visible()
    page.close()


def test_only_the_pages_own_scripts_are_allowed(reports: dict[str, Path]) -> None:
    text = reports["plan"].read_text(encoding="utf-8")
    policy = text.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]
    assert policy.startswith("default-src &#39;none&#39;;")
    assert "unsafe-eval" not in policy
    scripts = policy.partition("script-src ")[2].split(" ")
    assert len(scripts) == 2
    assert all(len(base64.b64decode(own.removeprefix("&#39;sha256-").removesuffix("&#39;"))) == 32 for own in scripts)
