"""The app that `slt flower init` writes; Flower itself is not needed for it."""

import sys

import pytest

from slt_planner.cli.main import slt
from slt_planner.errors import SltError
from slt_planner.federated.engines.flower import QUIET, processes
from slt_planner.federated.engines.flower.app_folder import run_config_keys
from slt_planner.federated.engines.flower.introduction import free_memory, introduction
from tests.unit.tiny_runs import full_plan

tomllib = pytest.importorskip("tomllib")


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["slt", "flower", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            slt()
        told = capsys.readouterr()
        return end.value.code, told.out, told.err

    return run


@pytest.fixture
def plan(tmp_path):
    full_plan().save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_an_app_is_one_file_with_all_settings(command, plan, tmp_path):
    certificate = tmp_path / "ca.crt"
    certificate.write_text("")
    where = ("--superlink", "host:8000", "--root-certificates", certificate)
    code, out, _ = command("init", tmp_path / "My app!", "--plan", plan, "--clients", 4, "--deadline", 30, *where)
    assert code == 0
    assert [path.name for path in (tmp_path / "My app!").iterdir()] == ["pyproject.toml"]
    app = tomllib.loads((tmp_path / "My app!/pyproject.toml").read_text())
    assert app["project"]["name"] == "my-app"
    assert app["project"]["dependencies"] == []
    config = app["tool"]["flwr"]["app"]["config"]
    assert config.keys() == run_config_keys()
    assert (config["plan"], config["clients"], config["cohort-size"], config["deadline-s"]) == (str(plan), 4, 4, 30.0)
    assert all(isinstance(value, (str, int, float, bool)) for value in config.values())
    connection = tomllib.loads(out[out.index("[superlink.slt]") : out.index("and then")])
    assert connection == {"superlink": {"slt": {"address": "host:8000", "root-certificates": str(certificate)}}}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "give --root-certificates FILE, for TLS, or --insecure"),
        (("--insecure", "--root-certificates", "ca.crt"), "--insecure does not go with --root-certificates"),
        (("--root-certificates", "nowhere.crt"), "nowhere.crt: no such file"),
        (("--insecure", "--strategy", "magic"), "--strategy 'magic': known are"),
        (("--insecure", "--deadline", "-1"), "--deadline-s -1.0: Input should be greater than 0"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_and_nothing_is_written(command, plan, tmp_path, more, words):
    code, _, err = command("init", tmp_path / "app", "--plan", plan, *more)
    assert code == 2
    assert err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "app").exists()


def test_an_app_is_not_overwritten(command, plan, tmp_path):
    arguments = ("init", tmp_path / "app", "--plan", plan, "--insecure")
    assert command(*arguments)[0] == 0
    assert "exists" in command(*arguments)[2]
    assert command(*arguments, "--force")[0] == 0


def test_when_a_part_has_ended_the_way_on_is_told(command, plan, tmp_path, monkeypatch):
    pytest.importorskip("flwr")
    pytest.importorskip("ray")
    app = tmp_path / "app"
    command("init", app, "--plan", plan, "--insecure")

    class Ended(processes.LocalFederation):
        def __enter__(self):
            return self

        def submit(self, app, overrides=""):
            (tmp_path / "app/run").mkdir()
            return 1

        def status(self, run_id):
            raise SltError("superlink has ended: it said nothing")

    monkeypatch.setattr(processes, "LocalFederation", Ended)
    code, _, err = command("local", app)
    assert code == 1
    assert f"superlink has ended: it said nothing; go on with slt flower local {app} --resume\n" in err


def test_only_an_app_is_run(command, tmp_path):
    code, _, err = command("local", tmp_path)
    assert (code, "make one with slt flower init" in err) == (2, True)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    assert "not an app of slt flower init" in command("local", tmp_path)[2]


def test_telemetry_is_off_unless_the_user_turns_it_on():
    assert QUIET["FLWR_TELEMETRY_ENABLED"] == QUIET["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_node_says_what_its_config_says():
    own = introduction({"partition-id": 7, "tier": "measured", "dataset": "imagefolder:/data"})
    assert (own.client, own.tier, own.own_images) == (7, "measured", True)
    assert 0 < own.free_bytes <= 2**50
    assert introduction({}).free_bytes is None
    assert free_memory() > 2**20
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        introduction({"partition-id": -1})
