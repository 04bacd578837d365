"""How large pages of reports are, and how long Chromium takes to open them.

    python benchmarks/report_opening.py [FILE.html ...]

Without files: a made-up plan of 200 units and 200 stages for three tiers, as the tests of the pages have it, and the
sample pages under reports/. Seconds count from the navigation: until the page has loaded and can be read, until its
first chart is drawn, and until all are (those out of sight are drawn while nothing else happens). Medians of five.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from slt_planner.environment import environment
from slt_planner.files import write_text
from slt_planner.reporting.pages.plan import plan_page

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/report_opening.json"
REPEATS = 5


def opening(browser: Browser, page_file: Path) -> tuple[float, float, float]:
    """Seconds until a page has loaded, has its first chart, and has all."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    began = time.perf_counter()
    page.goto(page_file.as_uri())
    loaded = time.perf_counter() - began
    page.wait_for_selector("figure > .chart[data-drawn]", state="attached")
    first = time.perf_counter() - began
    page.wait_for_selector("html[data-charts=drawn]", state="attached")
    drawn = time.perf_counter() - began
    context.close()
    return loaded, first, drawn


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        files = [Path(name) for name in sys.argv[1:]]
        if not files:
            sys.path.insert(0, str(ROOT))
            from tests.integration.test_report_browser import deep_plan

            deep = Path(folder) / "200 units.html"
            write_text(deep, plan_page(deep_plan(), command=None))
            files = [deep, *sorted((ROOT / "reports").glob("**/*.html"))]
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        rows = []
        for file in files:
            opening(browser, file)  # warm-up
            loaded, first, drawn = map(
                statistics.median, zip(*(opening(browser, file) for _ in range(REPEATS)), strict=True)
            )
            name = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else file.name
            rows.append(
                {
                    "page": name,
                    "bytes": file.stat().st_size,
                    "loaded_s": round(loaded, 2),
                    "first_chart_s": round(first, 2),
                    "all_charts_s": round(drawn, 2),
                }
            )
            print(rows[-1], flush=True)
        result = {"browser": f"Chromium {browser.version}", "environment": environment(0), "rows": rows}
        browser.close()
    write_text(RESULT, json.dumps(result, indent=2) + "\n", force=True)


if __name__ == "__main__":
    main()
