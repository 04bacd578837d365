"""The server's side: a cohort's tasks go out as messages, and what comes back in time is a round's updates."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Event

from flwr.app import ArrayRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from slt_planner.config import Config, StepSettings
from slt_planner.errors import InputError, SltError
from slt_planner.federated.availability import Answer
from slt_planner.federated.client import client_seed
from slt_planner.federated.engines.base import Assignment, RoundLog
from slt_planner.federated.engines.flower.introduction import MEASURED, Introduction
from slt_planner.federated.engines.flower.messages import (
    Brief,
    Outcome,
    Task,
    packed,
    record_in,
    weights_in,
    write_state,
)
from slt_planner.federated.engines.flower.options import FlowerOptions
from slt_planner.federated.progress import Holders
from slt_planner.federated.refusals import Screen
from slt_planner.federated.result import Refusal
from slt_planner.federated.setup import Run
from slt_planner.federated.strategies.base import ServerState
from slt_planner.memory.step import as_trained
from slt_planner.submodel.extract import extract
from slt_planner.submodel.merge import Update
from slt_planner.units import format_bytes

_LOG = logging.getLogger(__name__)
_FIRST_POLL_S, _LAST_POLL_S = 0.01, 0.5
_LOOK_S = 5.0  # between two looks at who is connected, which a SuperLink of many nodes takes long to list
_ERRORS: dict[int, tuple[Answer, str]] = {
    1: ("failed", "its client app cannot be loaded"),
    2: ("failed", ""),  # what the client itself says
    3: ("late", ""),  # its task, or its answer, has expired
    4: ("late", ""),
    5: ("never", "its node is gone"),
    6: ("failed", "its node refused the task"),
    7: ("failed", "its node refused the app"),
    8: ("failed", "its process was killed"),
}


@dataclass
class _Node:
    """A node that has introduced itself, and the stage and depth of the unchanging weights that it keeps."""

    node_id: int
    introduction: Introduction
    kept: tuple[int, int] | None = None


@dataclass
class FlowerEngine:
    """Clients that are nodes of a Flower grid; client c is the node whose ``partition-id`` is c.

    Args:
        grid: what Flower gives a server app.
        options: deadlines.
        stopping: when it is set, the run ends as by Ctrl-C.

    Raises:
        SltError: in a round, when too few clients are connected, or a simulation has lost one of its processes.
    """

    grid: Grid
    options: FlowerOptions = field(default_factory=FlowerOptions)
    stopping: Event = field(default_factory=Event)
    _nodes: dict[int, _Node] = field(default_factory=dict)  # by client
    _known: set[int] = field(default_factory=set)  # ids of nodes that were asked who they are
    _asked: dict[str, int] = field(default_factory=dict)  # those that have not answered yet, by the question
    _spare: dict[int, Message] = field(default_factory=dict)  # answers of nodes without a number, while none is free
    _turned_away: dict[int, str] = field(default_factory=dict)  # clients that cannot take part, and why
    _began: bool = False

    def meet(self, run: Run) -> Run:
        """Wait until enough clients are there; the run with the tiers that they say they are in."""
        clients, least = run.settings.clients, self._least(run)
        enough = least if self._began else clients
        until, poll = time.monotonic() + self.options.wait_s, _FIRST_POLL_S
        while len(there := self._connected(run)) < enough and time.monotonic() < until:
            poll = self._pause(poll)
        if len(there) < least:
            raise SltError(
                f"{len(there)} of {clients} clients are connected after {self.options.wait_s:g} s, at least {least} "
                "must be; start their SuperNodes, and go on with the run"
            )
        if not self._began and len(there) < clients:
            _LOG.warning("the run begins with %d of its %d clients", len(there), clients)
        self._began = True
        tiers = list(run.tier_of)
        for client, node in self._nodes.items():
            if node.introduction.tier is not None:
                tiers[client] = _tier(run, node.introduction)
        return replace(run, tier_of=tuple(tiers))

    def holders(self, expected: Holders) -> Holders:
        """Those whose node has confirmed the weights: one that is new, or failed, gets them again."""
        having = {c for c, node in self._nodes.items() if node.kept == (expected.stage, expected.depth)}
        return expected.model_copy(update={"clients": tuple(c for c in expected.clients if c in having)})

    def run_clients(
        self,
        run: Run,
        state: ServerState,
        cohort: Sequence[Assignment],
        holders: Holders,
        screen: Screen,
        log: RoundLog,
    ) -> Iterator[Update]:
        """Send the tasks, wait for all answers or the deadline, and look at what came, in the cohort's order."""
        began = time.perf_counter()
        nodes, sent = self._send(run, state, cohort, holders)
        replies = self._wait(run, sent)
        log.train_seconds += time.perf_counter() - began
        came = sum(not reply.has_error() for reply in replies.values())
        too_few = f"{came} of {len(cohort)} clients answered, at least {self._least(run)} must"
        for assignment in cohort:
            client, reply = assignment.client, replies.pop(assignment.client, None)
            if reply is None or reply.has_error():
                self._take_down(client, client in nodes, None if reply is None else reply.error, log)
            else:
                nodes[client].kept = (holders.stage, holders.depth)
                if came < self._least(run):
                    log.refusals.append(Refusal(client=client, reason=too_few))
                else:
                    yield from self._update(assignment, nodes[client], reply, screen, log)

    def _least(self, run: Run) -> int:
        return min(self.options.minimum_answers, run.settings.cohort_size)

    def _connected(self, run: Run) -> dict[int, _Node]:
        """The clients whose nodes are there now; nodes that are new are asked who they are."""
        there = set(self.grid.get_node_ids())
        for node_id in sorted(there - self._known):
            self._known.add(node_id)
            self._asked[self._push(Message(RecordDict(), node_id, MessageType.QUERY))] = node_id
        replies, self._spare = self._spare, {}
        if self._asked:
            for reply in self.grid.pull_messages(list(self._asked)):
                replies[self._asked.pop(reply.metadata.reply_to_message_id)] = reply
        for node_id, reply in replies.items():
            try:
                self._register(run, node_id, reply, there)
            except InputError as error:
                _LOG.warning("node %d does not take part: %s", node_id, error)
        return {client: node for client, node in self._nodes.items() if node.node_id in there}

    def _register(self, run: Run, node_id: int, reply: Message, there: set[int]) -> None:
        """Who a node is: a client that comes again, perhaps as another node, takes its place."""
        if reply.has_error():
            raise InputError(f"it could not say who it is ({_one_line(reply.error)})")
        own = record_in(reply, Introduction)
        client = own.client
        if client is None:
            client = self._free_number(run, there)
        if client is None:
            self._spare[node_id] = reply
            return
        if client >= run.settings.clients:
            raise InputError(f"the run has {run.settings.clients} clients, numbered from 0")
        self._turned_away.pop(client, None)
        if own.tier is not None:
            try:
                _tier(run, own)
            except InputError as error:
                self._turned_away[client] = str(error)
                raise
        self._nodes[client] = _Node(node_id, own)

    def _free_number(self, run: Run, there: set[int]) -> int | None:
        """The first number that no node has, or else that of a node which is gone."""
        numbers = range(run.settings.clients)
        gone = (c for c in numbers if c in self._nodes and self._nodes[c].node_id not in there)
        return next((c for c in numbers if c not in self._nodes), next(gone, None))

    def _send(
        self, run: Run, state: ServerState, cohort: Sequence[Assignment], holders: Holders
    ) -> tuple[dict[int, _Node], dict[str, int]]:
        """The nodes of those clients of the cohort that are there, and the clients by the messages they were sent."""
        plan, settings, there = run.plan, run.settings, self._connected(run)
        brief = Brief(
            model=plan.model,
            input_shape=plan.input_shape,
            num_classes=plan.num_classes,
            dataset=settings.dataset,
            data_root=settings.data_root,
        )
        slices: dict[tuple[Config, StepSettings, int], ArrayRecord] = {}  # clients of a tier get the same one
        nodes = {own.client: there[own.client] for own in cohort if own.client in there}
        sent: dict[str, int] = {}
        for own in cohort:
            if own.client not in nodes:
                continue
            node, training = nodes[own.client], own.training
            held_depth = holders.depth if own.client in holders.clients else 0
            key = (own.config, training.step, held_depth)
            if key not in slices:
                slices[key] = _slice(run, state, *key)
            task = Task(
                brief=brief,
                round=state.round + 1,
                stage=holders.stage,
                config=own.config,
                training=training,
                seed=client_seed(settings.seed, state.round + 1, own.client),
                budget_bytes=own.budget_bytes if training.enforce else None,
                held_depth=held_depth,
                keep_depth=holders.depth,
            )
            images = None if node.introduction.own_images else own.indices
            content = packed(task, slices[key], images)
            deadline, group = self.options.deadline_s, str(state.round + 1)
            sent[self._push(Message(content, node.node_id, MessageType.TRAIN, ttl=deadline, group_id=group))] = (
                own.client
            )
        return nodes, sent

    def _push(self, message: Message) -> str:
        """One at a time: a request has a largest size."""
        self.grid.push_messages([message])
        return message.metadata.message_id

    def _wait(self, run: Run, waiting: dict[str, int]) -> dict[int, Message]:
        """What has come, by client, when all have answered or the deadline has passed.

        Nodes that come meanwhile are asked who they are, so that they take part in the next round.
        """
        looked = time.monotonic()
        until, poll = looked + self.options.deadline_s, _FIRST_POLL_S
        replies: dict[int, Message] = {}
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                replies[waiting.pop(reply.metadata.reply_to_message_id)] = reply
            now = time.monotonic()
            if not waiting or now >= until:
                break
            if now - looked >= _LOOK_S:
                self._connected(run)
                looked = now
            poll = self._pause(poll)
        return replies

    def _pause(self, seconds: float) -> float:
        """Wait a little, a little longer the next time; the end of the run, if it is to end."""
        if self.stopping.wait(seconds):
            raise KeyboardInterrupt
        return min(2 * seconds, _LAST_POLL_S)

    def _take_down(self, client: int, asked: bool, error: Error | None, log: RoundLog) -> None:
        """Name a client without an update."""
        if client in self._nodes:
            self._nodes[client].kept = None
        answer: Answer = "late"
        reason = f"no answer within {self.options.deadline_s:g} s"
        if not asked:
            answer, reason = "never", self._turned_away.get(client, "its node is not connected")
        elif error is not None:
            if error.code not in _ERRORS:
                raise SltError(
                    f"Flower lost the process of client {client} ({_one_line(error)}); it would be missing "
                    "for the rest of the run, so this stops here: go on with the run"
                )
            answer, known = _ERRORS[error.code]
            if answer != "late":
                reason = known or _one_line(error)
        log.answers[client] = answer
        named = log.refusals if answer == "failed" else log.absent
        named.append(Refusal(client=client, reason=reason))

    def _update(
        self, assignment: Assignment, node: _Node, reply: Message, screen: Screen, log: RoundLog
    ) -> Iterator[Update]:
        """A client's update, if it is one and passes the screen."""
        try:
            outcome, trained = record_in(reply, Outcome), weights_in(reply)
            if not node.introduction.own_images and outcome.samples != len(assignment.indices):
                raise InputError(f"it says {outcome.samples} images, of its {len(assignment.indices)}")
        except InputError as error:
            log.refusals.append(Refusal(client=assignment.client, reason=str(error)))
            return
        loss = math.nan if outcome.loss is None else outcome.loss
        if log.add(assignment.client, screen.verdict(assignment.config, trained, outcome.samples, loss), loss):
            yield assignment.config, trained, outcome.samples


def _slice(run: Run, state: ServerState, config: Config, step: StepSettings, held_depth: int) -> ArrayRecord:
    """The weights of a sub-model, those of the units after the ones that the client has."""
    model = as_trained(extract(run.graph, state.weights, config, step.norms), step)
    units = run.graph.unit_of_tensor()
    return write_state({name: tensor for name, tensor in model.held_state().items() if units[name] > held_depth})


def _tier(run: Run, introduction: Introduction) -> int:
    """A node's tier, as its place in the plan.

    Raises:
        InputError: the plan has no such tier, or none that fits the free memory.
    """
    tiers = run.plan.tiers
    if introduction.tier != MEASURED:
        for place, tier in enumerate(tiers):
            if tier.name == introduction.tier:
                return place
        raise InputError(f"its tier is {introduction.tier}; the plan has {', '.join(tier.name for tier in tiers)}")
    free = introduction.free_bytes or 0
    fitting = [place for place, tier in enumerate(tiers) if tier.budget_bytes <= free]
    if not fitting:
        least = min(tier.budget_bytes for tier in tiers)
        raise InputError(f"it has {format_bytes(free)} free, and the plan's least budget is {format_bytes(least)}")
    return max(fitting, key=lambda place: tiers[place].budget_bytes)


def _one_line(error: Error) -> str:
    return " ".join((error.reason or f"error {error.code}").split())[:300]
