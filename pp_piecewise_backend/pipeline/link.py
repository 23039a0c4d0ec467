"""Both ends of a link, on top of any transport: the order of micro-batches, signs of life, and how a link stops.

Note [liveness]
Both ends of a link send one another a keep-alive every ``silence_seconds / 3``, from a thread of its own, and listen in
another. So a peer that pauses is never taken for lost, and one that dies or is stopped is lost after at most
``silence_seconds``, whatever this rank does meanwhile. Waits for headers and data therefore need no short limit of
their own: the thread that finds a peer lost ends them all. It records the ``Fault`` of this rank, notifies the other
neighbours, so that a pipeline fails at once and not rank by rank, and breaks the transfers that are under way.
A rank that compiles may hold up its own threads; it says so before (``Links.busy``), and has ``setup_seconds`` then.

Note [who may wait for the verdict]
A transfer that breaks waits for the listener to say why. The listener itself posts receives, and others do so holding
what it needs to go on, so posting never waits: a receive that finds its wire broken fails in its transfer's ``wait()``.

Note [stopping]
Each end says STOP when it has nothing more to say, and listens on until the other has said it too; who then hears STOP
repeats it, since the other may wait for it. A receiving end that says STOP first asks for an early end: what was
announced before the sending end stops must still be received.

Note [closing]
A rank may fail after all have stopped, such as when an exception ended its loop over micro-batches. So no rank of the
chain is done before all are: CLOSED goes from the first to the last rank as each comes to close, then back, while the
links between stages still listen for FAILED. A rank that is gone by then went in order, and one that does not come for
``silence_seconds`` has other things to do: nobody waits longer for it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from .. import errors
from ..utils.counters import Amounts, Stats
from .fault import Fault, Loss
from .header import MAX_TAG_BYTES, Answer, Header, Kind
from .plan import Plan, Schema
from .positions import Place, Positions, Saying, Step
from .report import RankTimes, TimesOfRanks
from .transports.base import Patience, Pending, Wire
from .transports.tensor_parallel import TensorParallel

Result = TypeVar("Result")

_TELLING_SECONDS = 0.3
"""How long a failing rank tries to notify one neighbour."""


@dataclass(frozen=True)
class LinkSettings:
    """What all links of one rank share."""

    plan: Plan
    patience: Patience
    fault: Fault
    stats: Stats
    times: TimesOfRanks
    positions: Positions
    tensor_parallel: TensorParallel | None = None
    """None: each stage is one rank."""

    def sizes_bytes(self, schema: Schema | None) -> tuple[int, ...]:
        """What a link carries for one token, and for the most; nothing without a link here."""
        if schema is None:
            return ()
        per_token = schema.bytes_per_token(self.tensor_parallel.size if self.tensor_parallel else 1)
        return per_token, per_token * self.plan.ladder.max_tokens


class End:
    """What both ends of a link do: send, listen, keep alive and stop."""

    is_receiver = False

    def __init__(self, wire: Wire, schema: Schema, own_rank: int, peer_rank: int, settings: LinkSettings) -> None:
        self.schema = schema
        self.own_rank = own_rank
        self.peer_rank = peer_rank
        self._wire = wire
        self._settings = settings
        self._fault = settings.fault
        self._tensor_parallel = settings.tensor_parallel
        self._sent_bytes_per_token = schema.bytes_per_token(self._tensor_parallel.size if self._tensor_parallel else 1)
        self._amounts: dict[int, Amounts] = {}
        """Number of tokens of a micro-batch -> what it adds to the counters."""
        self._told_data = 0
        self._heard_data = 0
        self._telling = threading.Lock()
        self._said_stop = threading.Event()
        self._heard_stop = threading.Event()
        self._is_busy = False
        """Whether this rank compiles and captures, which may hold up the thread that sends keep-alives."""
        self._peer_is_busy = False
        self._peer_announced_ns = 0
        """When the other end announced the last micro-batch; 0: none."""
        self._passing_on: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        """Ranks whose position the neighbour is to hear, see Note [positions of all ranks]; None: no more."""
        self._closes_in_turn = False
        self._stopped = threading.Event()
        """Both ends have said STOP, or the link is lost."""
        self._silent = threading.Event()
        """The listener has ended."""
        name = f"handoff {own_rank}-{peer_rank}"
        self._threads = [
            threading.Thread(target=self._listen, name=f"{name} listener", daemon=True),
            threading.Thread(target=self._keep_alive, name=f"{name} keep-alive", daemon=True),
        ]

    def start(self, closes_in_turn: bool = False) -> None:
        """Listen from now on; ``closes_in_turn``: also after both ends have stopped, see Note [closing]."""
        self._closes_in_turn = closes_in_turn
        self._fault.add(self)
        self._settings.positions.add(self)
        if closes_in_turn:  # a link between stages
            self._settings.times.add(self)
        for thread in self._threads:
            thread.start()

    # ---------------------------------------------------------------------------------- telling

    def _tell(self, kind: Kind, num_tokens: int = 0, tag: bytes = b"", answer: Answer = Answer.FEEDBACK) -> Header:
        plan = self._settings.plan
        bucket_tokens = plan.ladder.bucket(num_tokens) or 0
        with self._telling:
            numbers = plan.fingerprint, self._told_data, self.own_rank, num_tokens, bucket_tokens
            header = Header(kind, *numbers, tag, answer)
            self._wire.tell(header.pack())
            self._told_data += kind is Kind.DATA
        return header

    def say_stop(self) -> None:
        """Say that this end has nothing more to say; see Note [stopping]."""
        if not self._said_stop.is_set():
            self._said_stop.set()
            self._checked(lambda: "saying STOP", self._tell, Kind.STOP)

    def tell_failure(self, loss: Loss) -> None:
        """Notify the neighbour, if that can be done soon."""
        tag = loss.reason.encode("ascii", "replace")[:MAX_TAG_BYTES]
        told = 0 if loss.micro_batch is None else loss.micro_batch + 1
        longest_us = round(1e6 * (loss.step_timeout_s or 0))
        header = Header(Kind.FAILED, self._settings.plan.fingerprint, longest_us, loss.rank, told, tag=tag)
        ranks = self._settings.positions.known_ranks()
        if self._telling.acquire(timeout=_TELLING_SECONDS):
            try:
                with contextlib.suppress(ConnectionError, TimeoutError):
                    for said in (*filter(None, map(self._position, ranks)), header):
                        self._wire.flush(_TELLING_SECONDS)
                        self._wire.tell(said.pack())
                    self._wire.flush(_TELLING_SECONDS)
            finally:
                self._telling.release()

    def say_busy(self, busy: bool) -> None:
        """Say whether silence of this end means nothing for a while: it may hold up its own threads."""
        self._is_busy = busy
        self._checked(lambda: "saying what it does", self._tell_position, self.own_rank)

    def say_closed(self) -> None:
        """Say that this end, which has stopped, closes; nobody may be there to hear it."""
        self.check(lambda: "closing")
        with contextlib.suppress(ConnectionError, TimeoutError):
            self._tell(Kind.CLOSED)
        self._say_no_more()  # nobody listens

    def tell_times(self, stage: int, times: RankTimes) -> None:
        """Say to the neighbour what is known of a stage, if it still listens."""
        with contextlib.suppress(ConnectionError, TimeoutError), self._telling:
            numbers = self._settings.plan.fingerprint, self._told_data, self.own_rank, times.micro_batches, stage
            self._wire.tell(Header(Kind.TIMES, *numbers, times.to_bytes()).pack())

    def pass_on(self, rank: int) -> None:
        self._passing_on.put(rank)

    def seen(self) -> tuple[int, Place] | None:
        since_ns = self._peer_announced_ns
        place = Place(Step.INPUTS, self._heard_data - 1, since_ns)
        return (self.peer_rank, place) if since_ns and self._closes_in_turn else None

    def _say_no_more(self) -> None:
        """Nobody needs to hear of this end any more."""
        self._passing_on.put(None)

    def _position(self, rank: int) -> Header | None:
        """What says where a rank is, if that is known; the lock is held."""
        saying = self._settings.positions.known(rank)
        if saying is None:
            return None
        kind = Kind.KEEP_ALIVE if rank == self.own_rank else Kind.POSITION
        numbers = self._settings.plan.fingerprint, self._told_data, self.own_rank
        micro_batch = saying.place.micro_batch
        said = 0 if micro_batch is None else micro_batch + 1
        is_busy = self._is_busy and kind is Kind.KEEP_ALIVE
        return Header(kind, *numbers, said, rank, saying.to_bytes(is_busy))

    def _tell_position(self, rank: int) -> None:
        with self._telling:
            header = self._position(rank)
            if header is not None:
                self._wire.tell(header.pack())

    def _keep_alive(self) -> None:
        every_seconds = self._settings.patience.silence_seconds / 3
        next_at = time.monotonic() + every_seconds
        while True:
            try:
                rank = self._passing_on.get(timeout=max(0.0, next_at - time.monotonic()))
            except queue.Empty:
                rank, next_at = self.own_rank, time.monotonic() + every_seconds
            if rank is None:
                return
            try:
                self._tell_position(rank)
            except (ConnectionError, TimeoutError):
                return  # the listener finds out why

    # -------------------------------------------------------------------------------- listening

    def _listen(self) -> None:
        try:
            while True:
                header = self._hear()
                if header.kind is Kind.CLOSED:
                    return
                if header.kind is Kind.STOP:
                    self._heard_stop.set()
                    self._put(None)
                elif header.kind is Kind.TIMES:
                    self._settings.times.hear(header.bucket_tokens, header.num_tokens, header.tag, self)
                elif header.kind in (Kind.DATA, Kind.NOTICE):
                    if header.kind is Kind.DATA:
                        self._heard_data += 1
                        self._peer_announced_ns = time.perf_counter_ns()
                    self._put(header)
                if self._said_stop.is_set() and self._heard_stop.is_set() and not self._stopped.is_set():
                    # Who hangs up needs it no more; what it said before, such as FAILED, is still to be heard.
                    with contextlib.suppress(ConnectionError, TimeoutError):
                        self._tell(Kind.STOP)
                    self._stopped.set()
                    if not self._closes_in_turn:
                        self._say_no_more()
                        return
        except _Lost as lost:
            if not lost.is_notice:
                self._say_no_more()
            if not (lost.is_gone and self._stopped.is_set()):
                self._fault.record(lost.loss, found_by=None if lost.is_alive else self)
                if not lost.is_notice:
                    self._wire.break_control()
            if lost.is_notice:
                self._silent.set()
                self._put(None)
                self._listen_on()
        finally:
            self._stopped.set()
            self._silent.set()
            self._put(None)

    def _listen_on(self) -> None:
        """Until this end closes, for where the other ranks are."""
        with contextlib.suppress(_Lost, ConnectionError, TimeoutError):
            while True:
                self._hear()

    def _hear(self) -> Header:
        peer, patience = self.peer_rank, self._settings.patience
        silence_seconds = patience.setup_seconds if self._peer_is_busy else patience.silence_seconds
        try:
            message = self._wire.hear(silence_seconds)
        except TimeoutError:
            raise _Lost(Loss(peer, "silent", errors.peer_silent(peer, silence_seconds))) from None
        except ConnectionError as error:
            raise _Lost(Loss(peer, "connection closed", errors.peer_closed(peer, error)), is_gone=True) from None
        try:
            header = Header.unpack(message)
            header.check(self._settings.plan, self._heard_data, peer)
        except ValueError as error:
            loss = Loss(peer, "bad header", errors.peer_disagrees(peer, str(error)))
            raise _Lost(loss, is_alive=True) from None
        if header.kind is Kind.FAILED:
            reason = header.tag.decode("ascii", "replace")
            micro_batch = header.num_tokens - 1 if header.num_tokens else None
            longest_seconds = header.sequence / 1e6 if header.sequence else None
            sentence = errors.peer_failed(header.rank, reason, peer, micro_batch, longest_seconds)
            raise _Lost(Loss(header.rank, reason, sentence, micro_batch, longest_seconds), is_notice=True)
        if header.kind in (Kind.KEEP_ALIVE, Kind.POSITION):
            saying, is_busy = Saying.from_bytes(header.tag, header.num_tokens - 1 if header.num_tokens else None)
            if header.kind is Kind.KEEP_ALIVE:
                self._peer_is_busy = is_busy
            self._settings.positions.hear(header.bucket_tokens, saying, self)
        return header

    def _put(self, header: Header | None) -> None:
        """Hand on what was announced; None: no more comes, since the other end stops or the link is lost."""
        if header is not None:
            why = errors.peer_disagrees(self.peer_rank, "it announced data against the direction of the link")
            raise _Lost(Loss(self.peer_rank, "bad header", why), is_alive=True)

    # ------------------------------------------------------------------------------ transferring

    def _travelling(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """What of the tensors goes over this link."""
        parallel = self._tensor_parallel
        if parallel is None:
            return tensors
        pairs = zip(self.schema.proxies.values(), tensors, strict=True)
        return [parallel.share(tensor) if proxy.layout == "scattered" else tensor for proxy, tensor in pairs]

    def _count(self, tensors: str, num_bytes: str, num_tokens: int) -> None:
        amounts = self._amounts.get(num_tokens)
        if amounts is None:
            sent_bytes = num_tokens * self._sent_bytes_per_token
            amounts = self._amounts[num_tokens] = Amounts({tensors: len(self.schema.proxies), num_bytes: sent_bytes})
        amounts.add_to(self._settings.stats)

    # ---------------------------------------------------------------------------------- failing

    def break_off(self) -> None:
        self._wire.break_data()
        self._put(None)

    @property
    def is_broken(self) -> bool:
        """Whether a loss is known, which ``check`` raises."""
        return self._fault.loss is not None

    def check(self, doing: Callable[[], str]) -> None:
        """Raises `PeerLost` if the pipeline is broken.

        ``doing`` says what this end does, once somebody wants to know: a micro-batch has no time for texts.
        """
        if self._fault.loss is not None:
            self._fault.check(errors.on_rank(self.own_rank, doing()))

    def _checked(self, doing: Callable[[], str], call: Callable[..., Result], *arguments: Any) -> Result:
        """What ``call`` returns; `PeerLost` if the pipeline is broken, also without it."""
        self.check(doing)
        return self._judged(doing, call, *arguments)

    def _judged(self, doing: Callable[[], str], call: Callable[..., Result], *arguments: Any) -> Result:
        """What ``call`` returns; what goes wrong on the wire in it becomes `PeerLost`."""
        try:
            return call(*arguments)
        except (ConnectionError, TimeoutError) as error:
            loss = Loss(self.peer_rank, "connection closed", errors.peer_closed(self.peer_rank, error))
            raise self._fault.verdict(errors.on_rank(self.own_rank, doing()), loss, self) from error

    def wait_for_stop(self) -> None:
        """Return once the other end, too, has said STOP.

        Raises:
            PeerLost: the pipeline broke before.
        """
        self._stopped.wait(self._settings.patience.setup_seconds)
        self.check(lambda: f"waiting for STOP of rank {self.peer_rank}")

    def finish(self) -> None:
        """Return once everything sent and received here is there, after both ends have said STOP.

        Raises:
            PeerLost: the pipeline broke, now or before.
        """
        self._checked(lambda: f"finishing transfers with rank {self.peer_rank}", self._wire.finish)

    def wait_for_closed(self) -> None:
        """Return once the other end, which has stopped, closes or is gone, or does not come.

        Raises:
            PeerLost: the pipeline broke after all.
        """
        self._silent.wait(self._settings.patience.silence_seconds)
        self.check(lambda: f"waiting for rank {self.peer_rank} to close")

    def close(self) -> None:
        """Release the wire."""
        self._say_no_more()
        listener, keep_alive = self._threads
        if self.is_broken:
            keep_alive.join(_TELLING_SECONDS)  # it passes on what the neighbours may wait for
        if self.is_broken or not self._silent.is_set():
            self._wire.break_control()
        for thread in (listener, keep_alive):
            thread.join(_TELLING_SECONDS)
        self._wire.close()


@dataclass(eq=False)
class _Lost(Exception):
    loss: Loss
    is_alive: bool = False
    """Whether the peer can be notified."""
    is_gone: bool = False
    """Whether it hung up, which it may do when it has stopped."""
    is_notice: bool = False
    """Whether the peer said so, and still listens for where the other ranks are."""


class Sender(End):
    """The end of a link that announces micro-batches and sends their tensors."""

    _sent = 0

    def announce(self, num_tokens: int, tag: bytes = b"", answer: Answer = Answer.FEEDBACK) -> Header:
        """Tell the next stage what comes, and what the last one is to answer; its tensors may follow much later.

        Raises:
            ValueError: no number of tokens that the plan has, or a tag longer than 24 bytes.
            PeerLost: the pipeline broke.
        """
        ladder = self._settings.plan.ladder
        if ladder.bucket(num_tokens) is None:
            raise ValueError(errors.announced_rows_out_of_range(num_tokens, ladder.max_tokens))

        def doing() -> str:
            return f"announcing micro-batch {self._told_data} ({num_tokens} tokens)"

        header = self._checked(doing, self._tell, Kind.DATA, num_tokens, tag, answer)
        _ONE_HEADER.add_to(self._settings.stats)
        return header

    def notice(self, tag: bytes = b"") -> None:
        """Say that a micro-batch has ended of which no tensors follow.

        Raises:
            PeerLost: the pipeline broke.
        """
        self._checked(lambda: "saying that a micro-batch has ended", self._tell, Kind.NOTICE, 0, tag)
        _ONE_HEADER.add_to(self._settings.stats)

    def send(self, header: Header, tensors: Mapping[str, torch.Tensor], slot: int = 0) -> Pending:
        """Send the tensors of the micro-batch ``header``, in the order of the announcements and without a copy.

        Nobody may write into the tensors until ``wait()`` of what this returns; the bytes may leave as late as that.

        Raises:
            ValueError: the tensors are not what the plan says, or it is not their turn.
            PeerLost: the pipeline broke, here or in ``wait()``; names this rank, the micro-batch, its slot and bucket.
        """
        if header.sequence != self._sent:
            raise ValueError(errors.wrong_turn("sent", header.sequence, self._sent))
        ordered = self.schema.in_order(tensors, header.num_tokens)

        def doing() -> str:
            return f"sending {_what(header, slot)} to rank {self.peer_rank}"

        pending = self._checked(doing, self._wire.send, self._travelling(ordered))
        self._sent += 1
        self._count("sends", "bytes_sent", header.num_tokens)
        enqueued = None if pending.enqueued is None else partial(self._judged, doing, pending.enqueued)
        return Pending(partial(self._judged, doing, pending.wait), enqueued)

    @property
    def stop_requested(self) -> bool:
        """Whether the next stage asks for an early end."""
        return self._heard_stop.is_set()


class Receiver(End):
    """The end of a link that hears of micro-batches and receives their tensors into memory of the caller."""

    is_receiver = True

    def __init__(self, wire: Wire, schema: Schema, own_rank: int, peer_rank: int, settings: LinkSettings) -> None:
        super().__init__(wire, schema, own_rank, peer_rank, settings)
        self._headers: queue.SimpleQueue[Header | None] = queue.SimpleQueue()
        self._received = 0
        self._at_end = False
        self.on_news: Callable[[], None] | None = None
        """Called, in the listener's thread, when ``next_header`` has something to return or raise."""

    @property
    def takes_the_device(self) -> bool:
        """Whether a receive computes on the device while it waits for its sender."""
        return self._wire.receives_take_the_device

    @property
    def headers_waiting(self) -> int:
        """Headers that ``next_header`` would return without waiting."""
        return self._headers.qsize()

    def landing_memory(self, num_tokens: int) -> dict[str, torch.Tensor]:
        """For each proxy flat uint8 zeros for ``num_tokens`` tokens; nothing where any memory will do.

        Some transports write only into memory that they know. The tensors belong to the caller.

        Raises:
            PeerLost: the pipeline broke.
        """
        blocks = {}
        for name, proxy in self.schema.proxies.items():
            num_bytes = num_tokens * proxy.bytes_per_token
            block = self._checked(lambda: "sharing landing memory", self._wire.landing_memory, num_bytes)
            if block is not None:
                blocks[name] = block
        return blocks

    def offer(self, views: Mapping[str, torch.Tensor]) -> bool:
        """Let a micro-batch that was not announced yet land in the first rows of ``views``; whether that can be.

        It is the next one for which neither ``offer`` nor ``receive`` was called. Its sender then needs no answer to
        the announcement, and ``receive`` gets views of the same memory.
        """
        if any(proxy.layout == "scattered" for proxy in self.schema.proxies.values()):
            return False  # where the share of a rank lies depends on the number of tokens
        try:
            return self._wire.offer([views[name] for name in self.schema.proxies])
        except (ConnectionError, TimeoutError):
            return False  # the receive says so

    def next_header(self) -> Header | None:
        """The next micro-batch that was announced, however long that takes; None once the sender has stopped.

        Raises:
            PeerLost: the pipeline broke.
        """
        if self._at_end:
            return None
        self.check(self._waiting_for_header)
        header = self._headers.get()
        if header is None:
            self.check(self._waiting_for_header)
            self._at_end = True
            return None
        _ONE_HEADER.add_to(self._settings.stats)
        return header

    def receive(self, header: Header, views: Mapping[str, torch.Tensor], slot: int = 0) -> Pending:
        """Let the tensors of the micro-batch ``header`` land in ``views``, in the order of the headers.

        ``views`` are contiguous ``[num_tokens, *shape]``, in ``landing_memory`` where there is one; they may be written
        from now on, and hold the tensors after ``wait()`` of what this returns. ``slot`` names the memory in errors.

        Raises:
            ValueError: the views are not what the plan says, or it is not their turn.
            PeerLost: the pipeline is known to be broken; what breaks here shows in ``wait()``.
        """
        if header.sequence != self._received:
            raise ValueError(errors.wrong_turn("received", header.sequence, self._received))
        ordered = self.schema.in_order(views, header.num_tokens)

        def doing() -> str:
            return f"receiving {_what(header, slot)} from rank {self.peer_rank}"

        self.check(doing)
        try:
            landed = self._landing(ordered)
        except (ConnectionError, TimeoutError) as error:
            landed = partial(_fail, error)  # see Note [who may wait for the verdict]
        self._received += 1
        self._count("recvs", "bytes_received", header.num_tokens)
        return Pending(partial(self._judged, doing, landed))

    def _landing(self, views: Sequence[torch.Tensor]) -> Callable[[], None]:
        pending, parallel = self._wire.receive(self._travelling(views)), self._tensor_parallel
        if parallel is None:
            return pending.wait
        pairs = zip(self.schema.proxies.values(), views, strict=True)
        scattered = [view for proxy, view in pairs if proxy.layout == "scattered"]

        def landed() -> None:
            pending.wait()  # for all: no rank may wait for its siblings while its own neighbour waits for it
            for view in scattered:
                parallel.gather(view)

        return landed

    def _waiting_for_header(self) -> str:
        return f"waiting for the header of micro-batch {self._received}"

    def _put(self, header: Header | None) -> None:
        self._headers.put(header)
        if self.on_news is not None:
            self.on_news()


def _fail(error: Exception) -> None:
    raise error


class Sibling(End):
    """The end of a link between two ranks of one stage, which only notify one another that they live, fail or stop."""

    def break_off(self) -> None:
        super().break_off()
        if self._tensor_parallel is not None:
            self._tensor_parallel.break_off()


_ONE_HEADER = Amounts({"headers": 1})


def _what(header: Header, slot: int) -> str:
    return (
        f"micro-batch {header.sequence} (slot {slot}, {header.num_tokens} tokens, bucket {header.bucket_tokens}, "
        f"tag {header.tag!r})"
    )
