"""Set-up of one rank: which transport it takes, the plan that all ranks agree on, and its links."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from .. import errors
from ..runtime.stage import Stage
from ..utils.counters import TOTALS, Stats
from .fault import Fault, Loss
from .link import End, LinkSettings, Receiver, Sender, Sibling
from .plan import Plan, Schema, StagePlan, agree
from .positions import Place, Positions
from .report import TimesOfRanks
from .transports.base import LinkChoice, Patience, Transport, Wire
from .transports.tensor_parallel import TensorParallel

AnyEnd = TypeVar("AnyEnd", bound=End)


def pick_transport(
    asked: Transport | str, group: Any, mesh: Any, stage: Stage, setup_seconds: float
) -> tuple[Transport, TensorParallel | None]:
    """The way to the other stages, and the ranks with which this one holds its stage; see ``StageRunner``.

    With such ranks, what is captured of the ``stage`` is decided by all of them: see Note [ranks decide alike].

    Raises:
        ConfigError: the ranks, or tensors on the device of the stage, cannot go that way.
    """
    device = stage.device
    expected = "'auto', 'p2p', 'shared_memory', 'cuda_ipc' or a transport"
    if not isinstance(asked, str):
        if not all(hasattr(asked, name) for name in ("name", "stage", "stage_count", "ranks", "exchange", "wire")):
            raise errors.ConfigError(errors.runner_argument("transport", asked, expected))
        return asked, None
    from .transports.choosing import Auto
    from .transports.cuda_ipc import DeviceMemory
    from .transports.one_machine import KindOfSharing, OneMachine
    from .transports.shared_memory import HostMemory
    from .transports.torch_distributed import P2P

    if asked not in ("auto", "p2p", "shared_memory", "cuda_ipc"):
        raise errors.ConfigError(errors.runner_argument("transport", asked, expected))
    if group is not None and mesh is not None:
        raise errors.ConfigError(errors.runner_argument("mesh", mesh, "either a group or a mesh"))
    if not P2P.is_possible():
        raise errors.ConfigError(errors.NO_TRANSPORT)
    if mesh is not None:
        names = getattr(mesh, "mesh_dim_names", None) or ()
        if "pp" not in names:
            raise errors.ConfigError(errors.runner_argument("mesh", mesh, 'a mesh with a dimension named "pp"'))
        group = (mesh.get_group("pp"), mesh.get_group("tp")) if "tp" in names else mesh.get_group("pp")
    pipeline, siblings = group if isinstance(group, tuple) and len(group) == 2 else (group, None)
    for one in (pipeline, siblings):
        if one is not None and not P2P.has_this_rank(one):
            expected = "a process group that has this rank, or two: of the pipeline, and of the ranks of this stage"
            raise errors.ConfigError(errors.runner_argument("group", group, expected))
    p2p = P2P(device, pipeline, setup_seconds)
    kind: KindOfSharing | None = None
    if device.type == "cpu":
        kind = HostMemory()
    elif device.type == "cuda":
        kind = DeviceMemory(device)
    if asked in ("shared_memory", "cuda_ipc") and (kind is None or kind.name != asked):
        raise errors.ConfigError(errors.runner_argument("transport", asked, f"'auto' or 'p2p' for tensors on {device}"))
    way: Transport = p2p
    if kind is not None and asked != "p2p":
        way = Auto(p2p, kind) if asked == "auto" else OneMachine(p2p, kind)
    if siblings is None:
        return way, None
    parallel = TensorParallel(siblings, setup_seconds)
    stage.exchange = parallel.transport.exchange
    return way, parallel


@dataclass(frozen=True)
class Links:
    """All that one rank holds of the hand-off."""

    rank: int
    """How messages name this rank."""
    incoming: Receiver | None
    """From the previous stage; None on the first."""
    outgoing: Sender | None
    """To the next stage; None on the last."""
    feedback_in: Receiver | None
    """From the last stage, on the first."""
    feedback_out: Sender | None
    """To the first stage, on the last."""
    siblings: Sequence[Sibling] = field(repr=False)
    """To ranks that hold the stage together with this one."""
    times: TimesOfRanks
    """What is known of the times of all stages."""
    positions: Positions
    """Where all ranks are, as far as known."""
    _fault: Fault = field(repr=False)
    _transports: Sequence[Transport] = field(repr=False)

    @property
    def _ends(self) -> list[End]:
        ends = (self.outgoing, self.incoming, self.feedback_out, self.feedback_in, *self.siblings)
        return [end for end in ends if end is not None]

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While the body runs, the neighbours wait for signs of life as long as at set-up.

        Raises:
            PeerLost: the pipeline is broken.
        """
        for end in self._ends:
            end.say_busy(True)
        try:
            yield
        finally:
            if not self.is_broken:
                for end in self._ends:
                    end.say_busy(False)

    @property
    def choices(self) -> Sequence[LinkChoice]:
        """How the links of the pipeline came to their transport, where there was a choice."""
        return tuple(getattr(self._transports[0], "choices", ()))

    @property
    def is_broken(self) -> bool:
        return self._fault.loss is not None

    def check(self) -> None:
        """Raises `PeerLost` if the pipeline is broken."""
        self._fault.check(errors.on_rank(self.rank, "closing its links"))

    def fail(self, reason: str, micro_batch: int | None = None, step_timeout_s: float | None = None) -> None:
        """Tell all ranks that this one cannot go on, and at which micro-batch; they raise `PeerLost` at once.

        Args:
            reason: in at most 24 bytes.
            micro_batch: in whose step it is.
            step_timeout_s: the longest step that it may take, if that is why.
        """
        sentence = errors.own_failure(self.rank, reason, micro_batch, step_timeout_s)
        self._fault.record(Loss(self.rank, reason, sentence, micro_batch, step_timeout_s))

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """In the body is set up what uses the links; if it raises, other ranks are notified and the links closed."""
        try:
            yield
        except BaseException as error:
            self.fail(type(error).__name__)
            self.close()
            raise

    def close(self) -> None:
        """Say STOP on all links, wait until the neighbours said it and all close, and close the transport.

        Raises:
            PeerLost: the pipeline broke before; everything is closed nevertheless.
        """
        with contextlib.ExitStack() as stack:
            for transport in self._transports:
                stack.callback(transport.close)
            stack.callback(self._fault.forget_ends)
            for end in reversed(self._ends):
                stack.callback(end.close)
            if self._fault.loss is None:
                for end in self._ends:
                    end.say_stop()
                for end in self._ends:
                    end.wait_for_stop()
                for end in sorted(self._ends, key=lambda end: not end.is_receiver):
                    end.finish()
                self._close_in_turn()

    def _close_in_turn(self) -> None:
        """See Note [closing]."""
        if self.incoming is not None:
            self.incoming.wait_for_closed()
        if self.outgoing is not None:
            self.outgoing.say_closed()
            self.outgoing.wait_for_closed()
        if self.incoming is not None:
            self.incoming.say_closed()


def make_links(
    transport: Transport,
    own: StagePlan,
    patience: Patience | None = None,
    stats: Stats = TOTALS,
    tensor_parallel: TensorParallel | None = None,
    look: Callable[[], Place] | None = None,
) -> Links:
    """Compare the plans of all ranks, then make this rank's links; every rank of the pipeline calls it.

    Args:
        transport: to the other stages; closed with the links, or when this raises.
        own: what this rank was set up with.
        patience: how long ranks wait for one another.
        stats: counts headers, tensors and bytes.
        tensor_parallel: the ranks that hold this stage together with this one; then all ranks of all stages take part.
        look: says where this rank is, from any thread, for the errors of the others.

    Raises:
        PlanMismatch: on every rank, with every difference.
        PeerLost: a rank did not come within ``setup_seconds``.
    """
    rank = transport.ranks[transport.stage]
    positions, times = Positions(rank, look), TimesOfRanks(transport.ranks, transport.stage)
    fault = Fault(positions)
    transports: list[Transport] = [transport]
    if tensor_parallel is not None:
        transports.append(tensor_parallel.transport)
    try:
        plan = _agreed(transport, own, tensor_parallel)
        positions.sent_names = plan.sent_names
        settings = LinkSettings(plan, patience or Patience(), fault, stats, times, positions, tensor_parallel)
        stage, last = transport.stage, plan.stage_count - 1
        incoming = outgoing = feedback_in = feedback_out = None
        for hop in range(last):
            sizes_bytes = settings.sizes_bytes(
                own.outputs if stage == hop else own.inputs if stage == hop + 1 else None
            )
            wire = transport.wire(hop, hop + 1, "proxies", sizes_bytes)
            if wire is not None and stage == hop:
                outgoing = _started(Sender, wire, own.outputs, transport, hop + 1, settings, closes_in_turn=True)
            elif wire is not None:
                incoming = _started(Receiver, wire, own.inputs, transport, hop, settings, closes_in_turn=True)
        sizes_bytes = settings.sizes_bytes(own.feedback)
        if plan.has_feedback and (wire := transport.wire(last, 0, "feedback", sizes_bytes)) is not None:
            if stage == last:
                feedback_out = _started(Sender, wire, own.feedback, transport, 0, settings)
            else:
                feedback_in = _started(Receiver, wire, own.feedback, transport, last, settings)
        siblings = [] if tensor_parallel is None else _siblings(tensor_parallel.transport, settings)
    except BaseException as error:
        with contextlib.ExitStack() as stack:
            for opened in transports:
                stack.callback(opened.close)
            for end in fault.ends:
                stack.callback(end.close)
            reason = type(error).__name__
            fault.record(Loss(rank, reason, errors.own_failure(rank, reason, None, None)))
            fault.forget_ends()
        raise
    fault.end_exchange = transport.break_off
    return Links(rank, incoming, outgoing, feedback_in, feedback_out, siblings, times, positions, fault, transports)


def _agreed(transport: Transport, own: StagePlan, tensor_parallel: TensorParallel | None) -> Plan:
    rank = transport.ranks[transport.stage]
    own = replace(own, transport=transport.name)
    if tensor_parallel is None:
        return agree([transport.exchange(own.to_text(rank))])
    size = tensor_parallel.size
    pipeline = transport.exchange(own.to_text(rank, tensor_parallel.rank, size))
    if any(json.loads(text).get("tensor_parallel_size") != size for text in pipeline):
        return agree([pipeline])  # raises; a stage that is no group has nobody to exchange pipelines with
    return agree([json.loads(one) for one in tensor_parallel.transport.exchange(json.dumps(pipeline))])


def _siblings(transport: Transport, settings: LinkSettings) -> list[Sibling]:
    """A chain of links is enough: whoever hears of a failure notifies all neighbours."""
    siblings = []
    for lower in range(transport.stage_count - 1):
        wire = transport.wire(lower, lower + 1, "siblings")
        if wire is not None:
            peer = lower + 1 if transport.stage == lower else lower
            siblings.append(_started(Sibling, wire, Schema({}), transport, peer, settings))
    return siblings


def _started(
    kind: type[AnyEnd],
    wire: Wire,
    schema: Schema | None,
    transport: Transport,
    peer: int,
    settings: LinkSettings,
    closes_in_turn: bool = False,
) -> AnyEnd:
    """This rank's end of a link; the other one listens from now on, while this rank may have to wait for more links."""
    assert schema is not None, "agree() has seen to it"
    end = kind(wire, schema, transport.ranks[transport.stage], transport.ranks[peer], settings)
    end.start(closes_in_turn)
    return end
