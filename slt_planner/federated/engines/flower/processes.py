"""A SuperLink and SuperNodes as processes of this machine, for as long as a block lasts: to try a federation out."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from uuid import uuid4

from slt_planner.errors import SltError
from slt_planner.federated.engines.flower import QUIET, warden
from slt_planner.federated.engines.flower.app_folder import connection

_MARK = "SLT_FEDERATION"  # in the environment of all that is started, so that all of it can be ended
_START_S, _END_S, _POLL_S = 60.0, 10.0, 0.1


class RunStatus(NamedTuple):
    """What Flower knows of a run: how it ended (``completed``, ``failed``, ``stopped``; None: it goes on), why it
    failed, and the bytes that the SuperLink sent to nodes and got from them.
    """

    ended: str | None
    details: str
    sent_bytes: int
    received_bytes: int


class LocalFederation:
    """A SuperLink on loopback, without TLS, and SuperNodes 0 to `nodes` - 1 with these numbers as partition ids.

    Everything is kept in `folder`: the SuperLink's database, Flower's own home, logs. Leaving the block ends all
    processes, whatever has happened in it; on Linux so does the end of this process, even by `kill -9`.

    Args:
        folder: a folder of its own.
        nodes: how many SuperNodes to start.
        environment: more variables for all processes.

    Raises:
        SltError: a process ended at once, or the SuperLink is not ready within a minute; the message has its last line.
    """

    def __init__(self, folder: Path, nodes: int, environment: Mapping[str, str] | None = None) -> None:
        self.folder, self._number, mark = folder, nodes, uuid4().hex
        path = os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        )  # Flower starts its parts
        own = {"PATH": path, "FLWR_HOME": str(folder / "flwr"), _MARK: mark}
        self._environment = {**QUIET, **os.environ, **(environment or {}), **own}
        self._mark = f"{_MARK}={mark}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._warden: subprocess.Popen[bytes] | None = None
        self._address = ""

    def __enter__(self) -> "LocalFederation":
        """Start everything; SuperNodes connect while the first run is sent."""
        try:
            command = [sys.executable, "-I", warden.__file__, self._mark]
            self._warden = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
            self.start_superlink(free_port())
            for number in range(self._number):
                self.start_node(number)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End everything."""
        self.stop()

    def start_superlink(self, port: int) -> None:
        """Start the SuperLink, on the database of an earlier one if there was one, and wait until it answers."""
        self._address = f"127.0.0.1:{port}"
        (self.folder / "flwr").mkdir(parents=True, exist_ok=True)
        (self.folder / "flwr/config.toml").write_text(connection(self._address, None), encoding="utf-8")
        where = ["--host", "127.0.0.1", "--port", str(port), "--database", str(self.folder / "superlink.db")]
        self._start("superlink", "flower-superlink", "--insecure", *where)
        until = time.monotonic() + _START_S
        while not self._healthy():
            self._check("superlink")
            if time.monotonic() > until:
                raise SltError(f"the SuperLink is not ready after {_START_S:g} s ({self._last_line('superlink')})")
            time.sleep(_POLL_S)

    def start_node(self, number: int, **config: str) -> None:
        """Start a SuperNode; `config` goes into its node config, such as ``tier="64MB"``."""
        own = {"partition-id": str(number), "num-partitions": str(self._number)}
        own |= {name: json.dumps(value) for name, value in config.items()}
        told = " ".join(f"{name}={value}" for name, value in own.items())
        where = ["--superlink", self._address, "--port", str(free_port())]
        self._start(f"node{number}", "flower-supernode", "--insecure", *where, "--node-config", told)

    def kill(self, name: str) -> None:
        """End a process (``superlink``, ``node0``, ...) and what it started as `kill -9` does."""
        process = self._processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    @property
    def address(self) -> str:
        """Where the SuperLink listens."""
        return self._address

    def submit(self, app: Path, overrides: str = "") -> int:
        """Send a run of an app to the SuperLink; gives its id. `overrides` as in ``rounds=50 seed=1``."""
        more = ["-c", overrides] if overrides else []
        told = self._flwr("run", str(app), "slt", "--format", "json", *more)
        return int(told["run-id"])

    def status(self, run_id: int) -> RunStatus:
        """How a run is doing.

        Raises:
            SltError: the SuperLink has ended.
        """
        self._check("superlink")
        told = self._flwr("ls", "slt", "--run-id", str(run_id), "--format", "json")["runs"][0]
        state, _, ended = str(told["status"]).partition(":")
        sent, came = (int(told["network-traffic"][way]) for way in ("outbound-bytes", "inbound-bytes"))
        details = " ".join(str(told["status-details"] or "").split())
        return RunStatus(ended if state == "finished" else None, details, sent, came)

    def wait(self, run_id: int, timeout_s: float) -> RunStatus:
        """Wait until a run has ended; raises SltError if it goes on after `timeout_s`."""
        until = time.monotonic() + timeout_s
        while (status := self.status(run_id)).ended is None:
            if time.monotonic() > until:
                raise SltError(f"run {run_id} goes on after {timeout_s:g} s")
            time.sleep(_POLL_S)
        return status

    def log(self, name: str) -> str:
        """What a process has said so far."""
        path = self.folder / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def stop(self) -> None:
        """End everything that was started and all that it started: nodes first, kindly, and then with force."""
        for process in reversed(self._processes.values()):
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + _END_S
        for process in self._processes.values():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        warden.end_marked(self._mark)
        if self._warden is not None:
            self._warden.communicate()  # closes its standard input
            self._warden = None

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _check(self, name: str) -> None:
        if self._processes[name].poll() is not None:
            raise SltError(f"{name} has ended: {self._last_line(name)}")

    def _last_line(self, name: str) -> str:
        return (self.log(name).strip() or "it said nothing").splitlines()[-1]

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self._address}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _flwr(self, *command: str) -> dict[str, Any]:
        done = subprocess.run(
            ["flwr", *command],
            env=self._environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        try:
            told = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            told = {"success": False, "error-message": (done.stderr.strip() or done.stdout.strip())[-300:]}
        if done.returncode or not told.get("success", False):
            raise SltError(f"flwr {command[0]} failed: {' '.join(str(told.get('error-message', '')).split())}")
        return told

    def processes(self) -> list[int]:
        """The ids of all processes of this federation, as Linux tells them; elsewhere none."""
        return warden.marked(self._mark)


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])
