"""Counters: what happened, counted where it happens, and ``expect()`` to hold tests to exact numbers."""

from __future__ import annotations

import collections
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..errors import nearest


def counted(number: int, one: str, several: str = "") -> str:
    """``1 call``, ``2 calls``; ``several`` where it is not ``one`` with an s."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


class Counter(NamedTuple):
    """What one counter counts."""

    unit: str
    zero: int | float = 0
    is_gauge: bool = False
    """A gauge says what is held now: it may fall, and ``reset()`` leaves it alone."""


COUNTERS: Mapping[str, Counter] = {
    "programs": Counter("calls of the backend"),
    "calls": Counter("calls of programs"),
    "recompiles": Counter("calls of the backend after the first for the same code"),
    "recompiles_after_seal": Counter("calls of the backend after seal()"),
    "pieces": Counter("compute pieces of programs"),
    "pieces_compiled": Counter("compute pieces that were compiled"),
    "pieces_reused": Counter("compute pieces served by an earlier equal piece"),
    "captures": Counter("compute pieces captured into a graph"),
    "capture_seconds": Counter("seconds spent capturing", zero=0.0),
    "compile_seconds": Counter("seconds spent compiling pieces", zero=0.0),
    "graph_bytes": Counter("bytes of graph memory held now", is_gauge=True),
    "static_bytes": Counter("bytes of static memory held now", is_gauge=True),
    "replays": Counter("compute pieces replayed from a graph"),
    "eager_steps": Counter("eager steps run"),
    "input_copies": Counter("tensors copied into static inputs"),
    "input_bytes_copied": Counter("bytes copied into static inputs"),
    "border_copies": Counter("tensors copied for an eager step, where padding changes their strides"),
    "output_copies": Counter("tensors copied out for the caller"),
    "stage_input_copies": Counter("stage inputs of a call that were copied into landing memory"),
    "stage_inputs_in_place": Counter("stage inputs of a call that already lay in landing memory"),
    "padded_tokens": Counter("tokens added by padding, over replayed calls"),
    "foreign_captures": Counter("calls captured into a graph of somebody else, run without graphs of this package"),
    "grad_fallbacks": Counter("calls given to stock Inductor because gradients were required"),
    "headers": Counter("headers of micro-batches sent and received; keep-alives excluded"),
    "sends": Counter("tensors sent to another stage"),
    "recvs": Counter("tensors received from another stage"),
    "bytes_sent": Counter("bytes of tensors sent to another stage"),
    "bytes_received": Counter("bytes of tensors received from another stage"),
    "microbatches": Counter("micro-batches that a runner has run"),
    "direct_entries": Counter("micro-batches that entered their stage without Dynamo"),
    "proxy_copies": Counter("copies of a proxy between its landing or result memory and the wire"),
    "recv_allocations": Counter("tensors allocated for receiving while micro-batches run"),
    "pickles": Counter("objects pickled while micro-batches run; the package has no code that does"),
    "blocking_metadata": Counter(
        "headers of proxies that left only when their step had begun; a runner announces first"
    ),
    "early_releases": Counter("micro-batches whose landing memory was freed before the last step of the forward"),
    "send_waits": Counter("times a step that writes results really waited for a send"),
    "unmatched_split_ops": Counter("names in split_ops that matched nothing"),
}
"""The counters that ``Stats.add`` takes. ``miss_reasons`` and its sum ``graph_misses`` come on top."""

MISS_COUNTERS: Mapping[str, str] = {
    "graph_misses": "compute pieces that ran un-captured although graphs are on",
    "miss_reasons": "the same, as {reason: compute pieces}",
}

NAMES: tuple[str, ...] = (*COUNTERS, *MISS_COUNTERS)


class Snapshot(Mapping[str, Any]):
    """The counters at one moment; read-only, as ``snapshot.pieces`` or ``snapshot["pieces"]``."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__["_values"] = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"{type(self).__name__} has no counter {name!r}")
        return self._values[name]

    def __setattr__(self, name: str, value: object = None) -> None:
        raise AttributeError(f"a {type(self).__name__} is read-only")

    __delattr__ = __setattr__

    def __repr__(self) -> str:
        """Without the counters that are at zero."""
        return _text(self, {name: value for name, value in self.items() if value})


MAX_TO_SUM_UP = 256
"""Additions that may wait to be summed up."""


class Amounts:
    """Amounts to add at once, checked when they are made, so that who adds them in every call need not check again.

    Raises as ``Stats.add_many``.
    """

    __slots__ = ("pairs",)

    def __init__(self, amounts: Mapping[str, int | float]) -> None:
        for name, amount in amounts.items():
            counter = COUNTERS.get(name)
            if counter is None:
                raise ValueError(_unknown(name))
            if amount < 0 and not counter.is_gauge:
                raise ValueError(f"counter {name!r} only rises, got {amount}")
            if isinstance(amount, float) and isinstance(counter.zero, int):
                raise TypeError(f"counter {name!r} counts {counter.unit} in whole numbers, got {amount}")
        self.pairs = tuple(amounts.items())

    def add_to(self, stats: Stats) -> None:
        """Add them. They are summed up later, many at once and without a lock for each: a call has no time for that."""
        for each in stats._with_ancestors:
            added = each._added
            added.append(self)
            if len(added) > MAX_TO_SUM_UP:
                with each._lock:
                    each._sum_up()


class Stats:
    """A set of counters that threads may add to; each is readable as an attribute.

    Everything added is added to ``parent`` too, so what a program counted stays in the process totals
    after the program is gone.
    """

    def __init__(self, parent: Stats | None = None) -> None:
        self._with_ancestors: tuple[Stats, ...] = (self, *(() if parent is None else parent._with_ancestors))
        self._lock = threading.Lock()
        self._counts: dict[str, Any] = {name: counter.zero for name, counter in COUNTERS.items()}
        self._miss_reasons: dict[str, int] = {}
        self._added: deque[Amounts] = deque()
        """What was added since the counts were summed up."""

    def add(self, name: str, amount: int | float = 1) -> None:
        """Add ``amount`` in the counter's unit. Raises as ``add_many``."""
        self.add_many({name: amount})

    def add_many(self, amounts: Mapping[str, int | float]) -> None:
        """Add several amounts at once; on an error nothing is added.

        Raises:
            ValueError: an unknown name, one of the miss counters (``add_miss`` keeps these), or an
                amount below 0 for a counter that is not a gauge.
            TypeError: a fraction for a counter that counts whole things.
        """
        Amounts(amounts).add_to(self)

    def add_miss(self, reason: str, pieces: int = 1) -> None:
        """Count compute pieces that ran un-captured although graphs are on, all for one reason."""
        if pieces < 0:
            raise ValueError(f"cannot count {pieces} missed pieces")
        for stats in self._with_ancestors if pieces else ():
            with stats._lock:
                stats._miss_reasons[reason] = stats._miss_reasons.get(reason, 0) + pieces

    def as_dict(self) -> dict[str, Any]:
        """A copy of all counters, which no later addition changes."""
        with self._lock:
            self._sum_up()
            misses = dict(self._miss_reasons)
            return {**self._counts, "graph_misses": sum(misses.values()), "miss_reasons": misses}

    def snapshot(self) -> Snapshot:
        return Snapshot(self.as_dict())

    def reset(self) -> None:
        """Zero all counters but the gauges, here only: a parent keeps its totals."""
        with self._lock:
            self._sum_up()
            self._counts.update({name: c.zero for name, c in COUNTERS.items() if not c.is_gauge})
            self._miss_reasons.clear()

    def _sum_up(self) -> None:
        """Turn what was added into counts; the caller holds the lock, others may go on adding."""
        added = [self._added.popleft() for _ in range(len(self._added))]
        for amounts, times in collections.Counter(added).items():
            for name, amount in amounts.pairs:
                self._counts[name] += amount * times

    def __getattr__(self, name: str) -> Any:
        if name not in NAMES:
            raise AttributeError(f"{type(self).__name__} has no counter {name!r}; see stats.COUNTERS")
        return self.as_dict()[name]

    def __repr__(self) -> str:
        return _text(self, {name: value for name, value in self.as_dict().items() if value})


TOTALS = Stats()
"""The process totals: the parent of every program's ``Stats``."""


def stats() -> Snapshot:
    """The process totals since ``reset()``; they never fall when a program dies (gauges do)."""
    return TOTALS.snapshot()


@contextmanager
def expect(**deltas: Any) -> Iterator[None]:
    """Check that the body adds exactly these amounts to the process totals.

    ``with expect(pieces_compiled=3, miss_reasons={"first-call": 1}): ...``. Counters that are not named
    are not checked. An exception in the body passes through unchecked.

    Raises:
        ValueError: at entry, for an unknown name.
        AssertionError: at exit, naming each counter that differs, with what was expected and got.
    """
    for name in deltas:
        if name not in NAMES:
            raise ValueError(_unknown(name))
    before = TOTALS.as_dict()
    yield
    after = TOTALS.as_dict()
    differences = [
        f"{name}: expected {expected!r}, got {got!r}"
        for name, expected in deltas.items()
        if (got := _delta(before[name], after[name])) != expected
    ]
    if differences:
        raise AssertionError("counters differ from what was expected: " + "; ".join(differences))


def _delta(before: Any, after: Any) -> Any:
    if not isinstance(after, dict):
        return after - before
    deltas = {key: after.get(key, 0) - before.get(key, 0) for key in {**before, **after}}
    return {key: delta for key, delta in deltas.items() if delta}


def _text(counted: object, counts: Mapping[str, Any]) -> str:
    return f"{type(counted).__name__}({', '.join(f'{name}={value!r}' for name, value in counts.items())})"


def _unknown(name: str) -> str:
    if name in MISS_COUNTERS:
        return f"counter {name!r} is kept by add_miss(reason, pieces)"
    near = nearest(name, NAMES)
    return f"unknown counter {name!r}; " + (f"the nearest is {near!r}" if near else f"there are {', '.join(NAMES)}")
