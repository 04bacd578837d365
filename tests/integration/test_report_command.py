"""`slt report` of plans and runs that were made before."""

import webbrowser

import pytest

from slt_planner.federated.run_folder import METRICS, SETTINGS
from tests.unit.sample_records import sample_plan, sample_run


@pytest.fixture(scope="module")
def plan():
    return sample_plan()


def save_run(run, folder):
    folder.mkdir(parents=True)
    (folder / SETTINGS).write_text(run.model_dump_json(exclude={"rows"}))
    (folder / METRICS).write_text("".join(row.model_dump_json() + "\n" for row in run.rows))


@pytest.fixture
def records(plan, tmp_path):
    """Two plans, and a folder of three runs."""
    plan.save(tmp_path / "plan.json")
    sample_plan((80,)).save(tmp_path / "other.json")
    for run in (sample_run(plan=plan, rounds=14), sample_run(plan=plan, rounds=14, seed=1)):
        save_run(run, tmp_path / "runs" / run.title)
    save_run(sample_run("small", plan=plan, rounds=14), tmp_path / "runs" / "small-seed0")


@pytest.mark.parametrize(
    ("subjects", "title", "tables"),
    [
        (["plan.json"], "Training plan: resnet20", False),
        (["plan.json", "other.json"], "Training plans compared: resnet20", True),
        (["runs/slt-seed0"], "Federated training: resnet20", True),
        (["runs/slt-seed0", "runs/small-seed0"], "Federated training: resnet20", True),
        (["runs"], "Federated training: resnet20", True),
    ],
)
def test_whatever_there_is_becomes_a_page(command, records, tmp_path, subjects, title, tables):
    done = command("slt", "report", *subjects, "-o", "out/page.html")
    assert done.code == 0, done.err
    names = ["page.csv", "page.html", "page.md", "page.png", "page.tex"] if tables else ["page.html", "page.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert {name for name in names if f"out/{name}" in done.out} == set(names)
    text = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert f"<title>{title}</title>" in text
    assert f"slt report {' '.join(subjects)} -o out/page.html" in text


def test_a_folder_of_runs_is_compared_strategy_by_strategy(command, records, tmp_path):
    assert command("slt", "report", "runs", "-o", "page.html").code == 0
    lines = (tmp_path / "page.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [["slt", "2"], ["small", "1"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan.json", "runs", "-o", "x.html"], "plan.json is not a run folder; give plans alone, or run folders"),
        (["none.json", "-o", "x.html"], "none.json"),
        (["plan.json", "-o", "x.pdf"], "must end in .html"),
        (["plan.json", "other.json", "-o", "taken.html"], "taken.md exists; choose another name"),
    ],
)
def test_what_cannot_be_is_told_in_one_line_and_nothing_is_written(command, records, tmp_path, words, message):
    (tmp_path / "taken.md").write_text("mine")
    before = sorted(tmp_path.iterdir())
    done = command("slt", "report", *words)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "taken.md").read_text() == "mine"


@pytest.mark.parametrize("found", [True, False])
def test_open_shows_the_page_in_the_browser(command, records, tmp_path, monkeypatch, found):
    shown = []
    monkeypatch.setattr(webbrowser, "open", lambda address: shown.append(address) or found)
    done = command("slt", "report", "plan.json", "-o", "page.html", "--open")
    assert done.code == 0
    assert shown == [(tmp_path / "page.html").as_uri()]
    assert done.err == ("" if found else "No browser was found; open page.html yourself.\n")
