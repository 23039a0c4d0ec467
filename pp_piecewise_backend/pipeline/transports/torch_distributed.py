"""Stages in processes of their own, over ``torch.distributed``: gloo for tensors on the CPU, NCCL on GPUs.

Note [gloo waits]
A wait of gloo that runs out of time destroys the connection of the two ranks within its group, and with it every other
wait there; nothing else ends a wait whose peer was stopped. So each link has a group for messages and one for tensors,
waits for tensors last as long as the peer lives, and ``break_data`` lets a tiny receive run out of time on purpose.
``is_completed()`` of a gloo transfer stays False until somebody waits for it, so it cannot be asked instead.

Note [NCCL waits]
``wait()`` of NCCL lets the current stream wait. Given a time it blocks the host too, looking every 10 ms [read], so
tensors on a GPU are waited for without one; aborting the group ends what the stream waits for.

Note [ends of NCCL groups]
``shutdown()`` waits until all that was enqueued on a communicator has run. Then it joins a thread that runs until each
transfer has ended, as the destructor does. ``abort()`` tells kernels to end, and waits for the streams of its
communicator: where a send is queued behind the receive of another link, the one cannot be aborted before the other. The
time that is given as its limit is none. What is enqueued on a communicator while that is aborted may run for ever
[all read]. So

- who enqueues and who aborts take turns, see ``Use``, and nothing is enqueued on a group that was aborted;
- a group is aborted in a thread of its own, which is waited for no longer than ``_BREAKING_SECONDS``: by then its
  kernels were notified, and what it still waits for may be those of the group that is aborted next;
- the last transfers are waited for while links still listen, in ``finish``: a peer that stops then is lost as ever;
- after a loss all groups are aborted before any is shut down;
- ``close`` waits no longer than ``_CLOSING_SECONDS``, see Note [left to the end of the process].

Note [groups of links]
Only the ranks of a pipeline, or of a link, take part in making its groups: ``new_group`` would ask every rank of the
world to, or name groups by what each rank has made before. So they are made directly, over the store of the user's
group, and ``torch.distributed`` knows nothing of them: it counts and destroys its own as if they were not there. Nor is
a communicator of NCCL split off that of the world, for which NCCL would need all of its ranks. They number ranks by
stage, and those of a link number its source 0 and its target 1.

``isend``, ``irecv`` and the gathering are looked up in ``torch.distributed`` at each call, so that an observer can
count them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ... import errors
from .base import MESSAGE_BYTES, Pending, poll
from .ending import Ending, wait_for

_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
"""Its name in this torch."""
_DOWN, _UP, _BREAK = 0, 1, 2
"""Tags of messages with the data, against it, and of the receive that nobody answers."""
_BREAKING_SECONDS = 0.5
"""How long the breaking of one group holds up that of the next one."""
_CLOSING_SECONDS = 10.0
_COMMUNICATORS = "communicators of NCCL"


class P2P:
    """One rank's way to the others of its pipeline; ``torch.distributed`` must be initialised.

    Args:
        device: where the tensors of all links lie.
        group: the ranks of the pipeline, in stage order; all by default.
        setup_seconds: how long ranks wait for one another at set-up, and for data of a rank that lives.
    """

    name = "p2p"

    def __init__(
        self, device: torch.device | str, group: dist.ProcessGroup | None = None, setup_seconds: float = 1800.0
    ) -> None:
        self._meets_in: Any = group or dist.group.WORLD
        self.device = torch.device(device)
        self.ranks: list[int] = dist.get_process_group_ranks(self._meets_in)
        self.stage = self.ranks.index(dist.get_rank())
        self.stage_count = len(self.ranks)
        self.setup_seconds = setup_seconds
        self._setup = timedelta(seconds=setup_seconds)
        self._store: Any = None
        """What the ranks of this pipeline alone share, once they have met."""
        self._groups: list[Any] = []
        self._wires: list[P2PWire] = []
        self._own: Any = None
        """The group of all ranks of this pipeline, likewise."""

    @staticmethod
    def is_possible() -> bool:
        """Whether ``torch.distributed`` was initialised."""
        return dist.is_available() and dist.is_initialized()

    @staticmethod
    def has_this_rank(group: object) -> bool:
        """Whether something is a process group, and this rank is in it."""
        return isinstance(group, dist.ProcessGroup) and dist.get_rank() in dist.get_process_group_ranks(group)

    def exchange(self, text: str) -> list[str]:
        with self._meeting(errors.pipeline_of(self.ranks)):
            if self._own is None:
                self._meet()
            return [came.decode() for came in _gather_bytes(text.encode(), self._own)]

    def _meet(self) -> None:
        """Return once all ranks of this pipeline are here, as a group."""
        store = self._meets_in.get_group_store()
        # Each rank counts its meetings in the store itself, which may outlive a process group.
        own_count = f"pp_piecewise meetings of {self.stage}"
        meeting = store.add(own_count, 1)
        self._store = dist.PrefixStore(f"pp_piecewise meeting {meeting}", store)
        self._store.set(str(self.stage), "is here")
        try:
            self._store.wait([str(stage) for stage in range(self.stage_count)], self._setup)
        except RuntimeError:
            here = [self._store.check([str(stage)]) for stage in range(self.stage_count)]
            missing = [rank for rank, is_here in zip(self.ranks, here, strict=True) if not is_here]
            if missing:
                with contextlib.suppress(RuntimeError):  # it was no meeting: who tries again meets them in this one
                    self._store.delete_key(str(self.stage))
                    store.add(own_count, -1)
                raise TimeoutError(errors.did_not_come(missing)) from None
        self._own = self._new_group("all", self.stage, self.stage_count, "cpu")

    def wire(self, source: int, target: int, name: str, sizes_bytes: Sequence[int] = ()) -> P2PWire | None:
        if self.stage not in (source, target):
            return None
        is_source = self.stage == source
        with self._meeting(f"{name} from rank {self.ranks[source]} to rank {self.ranks[target]}"):
            link, number = f"{name} {source} {target}", 0 if is_source else 1
            control = self._new_group(f"messages of {link}", number, 2, "cpu")
            data = self._new_group(f"tensors of {link}", number, 2, self.device.type)
            wire = P2PWire(control, data, is_source, self._setup)
            del control, data
            self._wires.append(wire)
            try:
                wire.warm_up(self.device)
            except BaseException:  # the other end must not wait for this one
                wire.break_data()
                wire.break_control()
                raise
        return wire

    def break_off(self) -> None:
        """End every ``exchange``, from any thread."""
        if (own := self._own) is not None:
            break_group(own)

    def discard(self, wire: P2PWire) -> None:
        """Release a wire that is not used; both ends do so."""
        self._wires.remove(wire)
        groups = [self._groups.pop(self._groups.index(group)) for group in wire.groups]
        wire.close()
        _end(groups, wire.is_broken)

    def close(self) -> None:
        is_broken = any(wire.is_broken for wire in self._wires)
        while self._wires:
            self._wires.pop().close()
        self._own = self._store = None
        _end(self._groups, is_broken)

    def _new_group(self, name: str, rank: int, size: int, device_type: str) -> Any:
        """This rank's part of a group, see Note [groups of links]; ``name`` is new, and the same on all its ranks."""
        kind: Any = dist.ProcessGroupGloo if device_type == "cpu" else dist.ProcessGroupNCCL
        self._groups.append(kind(dist.PrefixStore(name, self._store), rank, size, self._setup))
        return self._groups[-1]

    @contextlib.contextmanager
    def _meeting(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ConnectionError, TimeoutError) as error:
            own, seconds = self.ranks[self.stage], self.setup_seconds
            raise errors.PeerLost(errors.ranks_missing_at_setup(own, what, seconds, error)) from error


def _gather_bytes(own: bytes, group: Any) -> list[bytes]:
    """What each rank of the group brought."""
    # Not by dist.all_gather: where that fails, it asks the world what the group is, which does not know it.
    lengths = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(group.size())]
    group.allgather([lengths], [torch.tensor([len(own)], device="cpu")]).wait()
    padded = torch.zeros(1 + int(max(lengths)), dtype=torch.uint8, device="cpu")  # no tensor without elements
    padded[: len(own)] = torch.tensor([*own], dtype=torch.uint8, device="cpu")
    gathered = [torch.empty_like(padded) for _ in lengths]
    group.allgather([gathered], [padded]).wait()
    return [bytes(whole[: int(length)].tolist()) for whole, length in zip(gathered, lengths, strict=True)]


class Use:
    """Of a group, in turns: entered to enqueue something on it; see Note [ends of NCCL groups].

    Raises:
        ConnectionError: when it is entered after the group was broken.
    """

    def __init__(self) -> None:
        self.is_over = False
        self._turn = threading.Lock()

    def __enter__(self) -> None:
        self._turn.acquire()
        if self.is_over:
            self._turn.release()
            raise ConnectionError("the link was closed")

    def __exit__(self, *_: object) -> None:
        self._turn.release()

    def end(self) -> None:
        """Before the group is broken, from any thread; does not wait long for who hangs while it enqueues."""
        self.is_over = True
        if self._turn.acquire(timeout=_BREAKING_SECONDS):
            self._turn.release()


class P2PWire:
    """One end of a link, with a group for its messages and one for its tensors."""

    def __init__(self, control: Any, data: Any, is_source: bool, longest: timedelta) -> None:
        self._control = control
        self._data = data
        self.groups: tuple[Any, ...] = (control, data)
        self._peer = int(is_source)
        self._is_source = is_source
        self._longest = longest
        self._longest_transfer = longest if _is_gloo(data) else None
        self.receives_take_the_device = not _is_gloo(data)
        self._use = Use()
        self._last_transfer: Sequence[Any] = ()
        """Over NCCL, where those of one link end in order."""
        self._tell_tag, self._hear_tag = (_DOWN, _UP) if is_source else (_UP, _DOWN)
        self._outgoing_bytes = bytearray(MESSAGE_BYTES)
        self._outgoing = torch.frombuffer(self._outgoing_bytes, dtype=torch.uint8)
        self._incoming_bytes = bytearray(MESSAGE_BYTES)
        self._incoming = torch.frombuffer(self._incoming_bytes, dtype=torch.uint8)
        self._leaving: Any = None

    @property
    def is_broken(self) -> bool:
        """Whether ``break_data`` was called."""
        return self._use.is_over

    def warm_up(self, device: torch.device) -> None:
        """Connect both groups, which would else happen within the first micro-batch."""
        probe = torch.zeros(1, dtype=torch.uint8, device=device)
        start = self._isend if self._is_source else self._irecv
        _wait([start(probe, self._data)], self._longest)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        self.tell(bytes(MESSAGE_BYTES))
        self.hear(self._longest.total_seconds())
        self.flush(self._longest.total_seconds())

    def tell(self, message: bytes) -> None:
        self.flush(self._longest.total_seconds())
        self._outgoing_bytes[:] = message
        with connection_errors():
            self._leaving = [self._isend(self._outgoing, self._control, self._tell_tag)]

    def flush(self, timeout_seconds: float) -> None:
        if self._leaving is not None:
            _wait(self._leaving, timedelta(seconds=timeout_seconds))
            self._leaving = None

    def hear(self, timeout_seconds: float) -> bytes:
        with connection_errors():
            work = [self._irecv(self._incoming, self._control, self._hear_tag)]
        try:
            _wait(work, timedelta(seconds=timeout_seconds))
        finally:
            work.clear()
        return bytes(self._incoming_bytes)

    def send(self, tensors: Sequence[torch.Tensor]) -> Pending:
        return self._move(self._isend, tensors)

    def offer(self, views: Sequence[torch.Tensor]) -> bool:
        return False  # a receive must know how much comes

    def receive(self, views: Sequence[torch.Tensor]) -> Pending:
        return self._move(self._irecv, views)

    def _isend(self, tensor: torch.Tensor, group: Any, tag: int = 0) -> Any:
        return dist.isend(tensor, group_dst=self._peer, group=_open(group), tag=tag)

    def _irecv(self, tensor: torch.Tensor, group: Any, tag: int = 0) -> Any:
        return dist.irecv(tensor, group_src=self._peer, group=_open(group), tag=tag)

    def _move(self, start: Callable[[torch.Tensor, Any], Any], tensors: Sequence[torch.Tensor]) -> Pending:
        with connection_errors(), self._use:
            moving = [start(tensor, self._data) for tensor in tensors]
        if self._longest_transfer is None:
            self._last_transfer = moving[-1:] or self._last_transfer
        kept = [*tensors]  # gloo reads and writes them until somebody has waited

        def wait() -> None:
            try:
                _wait(moving, self._longest_transfer)
            except BaseException:
                moving[:] = [_Broken()]
                raise
            finally:
                kept.clear()

        return Pending(wait)

    def landing_memory(self, num_bytes: int) -> None:
        return None  # gloo and NCCL receive anywhere

    def finish(self) -> None:
        # Those of gloo have been waited for, and cannot be asked: see Note [gloo waits].
        with connection_errors():
            poll(self._has_finished, self._longest.total_seconds())

    def _has_finished(self) -> bool:
        if self.is_broken:  # first: what is being aborted may not answer
            raise ConnectionError("the link was closed, and what was under way is lost")
        return all(transfer.is_completed() for transfer in self._last_transfer)

    def break_data(self) -> None:
        self._use.end()
        if (data := self._data) is not None:
            break_pair(data, self._peer)

    def break_control(self) -> None:
        if self._control is not None:
            break_pair(self._control, self._peer)

    def close(self) -> None:
        # The transport destroys the groups, when all links have stopped; what has no owner then closes its sockets.
        self._control = self._data = self._leaving = None
        self._last_transfer = ()
        self.groups = ()


def _open(group: Any) -> Any:
    """The group; None would be that of all ranks."""
    if group is None:
        raise ConnectionError("the link was closed")
    return group


class _Broken:
    """In the place of a transfer that failed, which whoever has its traceback would keep, and its group with it."""

    def wait(self, *_: object) -> None:
        raise RuntimeError("the transfer broke before")


def _wait(works: Sequence[Any], timeout: timedelta | None) -> None:
    """For all of a list, without a name for any: tracebacks would keep it, and its group with it."""
    with connection_errors():
        for number in range(len(works)):
            works[number].wait() if timeout is None else works[number].wait(timeout)


def _is_gloo(group: Any) -> bool:
    return bool(group.name() == "gloo")


@contextlib.contextmanager
def connection_errors() -> Iterator[None]:
    """``torch.distributed`` raises RuntimeError for all that goes wrong with a peer."""
    problem: Exception | None = None
    try:
        yield
    except RuntimeError as error:
        kind = TimeoutError if "Timed out waiting" in str(error) else ConnectionError
        problem = kind(str(error))
    if problem is not None:  # without a trace of the other, whose frames keep the group
        raise problem


def gather(whole: torch.Tensor, share: torch.Tensor, group: Any, use: Use | None = None) -> None:
    """Fill a flat tensor with the shares of all ranks of a group, in their order.

    Args:
        use: of the group, where this rank may break it.

    Raises:
        ConnectionError, TimeoutError: a rank was lost.
    """
    # gloo would wait in its turn.
    with connection_errors(), contextlib.nullcontext() if use is None or _is_gloo(group) else use:
        getattr(dist, _ALL_GATHER)(whole, share, group=group)


def break_group(group: Any) -> None:
    """End everything that this rank waits for within a group, from any thread."""
    peers = [peer for peer in range(group.size()) if peer != group.rank()]
    for peer in peers if _is_gloo(group) else peers[:1]:
        break_pair(group, peer)


def break_pair(group: Any, peer: int) -> None:
    """End everything that this rank and that ``peer`` of a group wait for, from any thread; see Note [gloo waits].

    Of NCCL, what any two ranks of the group wait for.

    Args:
        peer: its rank in the group.
    """
    if _is_gloo(group):
        nothing = torch.zeros(1, dtype=torch.uint8, device="cpu")
        with contextlib.suppress(RuntimeError, OSError):  # it runs out of time, or the pair was broken before
            _wait([dist.irecv(nothing, group_src=peer, group=group, tag=_BREAK)], timedelta(milliseconds=1))
    else:
        Ending(_COMMUNICATORS, [group], _abort).is_over(_BREAKING_SECONDS)


def _abort(group: Any) -> None:
    group.abort()


def _shut_down(group: Any) -> None:
    group.shutdown()


def _abort_and_shut_down(group: Any) -> None:
    with contextlib.suppress(RuntimeError):
        group.abort()
    group.shutdown()


def _end(groups: list[Any], is_broken: bool) -> None:
    """Release groups that nobody else has, and empty the list; see Note [ends of NCCL groups]."""
    on_gpus = [group for group in groups if not _is_gloo(group)]
    for group in groups:
        if _is_gloo(group):
            with contextlib.suppress(RuntimeError):  # broken
                group.shutdown()
    group = None
    groups.clear()
    if is_broken:
        endings = [Ending(_COMMUNICATORS, [on_gpus.pop()], _abort_and_shut_down) for _ in range(len(on_gpus))]
    else:
        endings = [Ending(_COMMUNICATORS, on_gpus, _shut_down)] if on_gpus else []
    wait_for(endings, _CLOSING_SECONDS)
