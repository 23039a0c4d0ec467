"""What callers of ``StageRunner`` may give it, and when they may call it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from .. import errors
from ..runtime.stage import Proxy
from .header import MicroBatch

Proxies = Mapping[str, Proxy]
MakeInputs = Callable[[int, bytes], Mapping[str, Any]]


def arguments(
    module: object,
    make_inputs: object,
    max_tokens: object,
    proxies: Mapping[str, object],
    feedback_rows: object,
    receive: object,
    max_in_flight: object,
    options: object,
) -> None:
    """Check what is known before the ranks meet.

    Args:
        proxies: those given as ``inputs``, ``outputs`` and ``feedback``.

    Raises:
        ConfigError: an argument that cannot be used.
    """
    for name, got, fits, expected in (
        ("module", module, isinstance(module, nn.Module), "a torch.nn.Module"),
        ("make_inputs", make_inputs, callable(make_inputs), "a function (num_tokens, tag) -> dict of arguments"),
        ("max_tokens", max_tokens, _is_count(max_tokens), "the rows of the largest micro-batch, at least 1"),
        *((name, got, _are_proxies(got), "None, or a dict of Proxy by name") for name, got in proxies.items()),
        ("feedback_rows", feedback_rows, feedback_rows in ("any", "tokens"), "'any' or 'tokens'"),
        ("receive", receive, receive in ("auto", "early", "step"), "'auto', 'early' or 'step'"),
        ("max_in_flight", max_in_flight, max_in_flight is None or _is_count(max_in_flight), "None or at least 1"),
    ):
        if not fits:
            raise errors.ConfigError(errors.runner_argument(name, got, expected))
    if options is not None and not isinstance(options, Mapping):
        raise errors.ConfigError(errors.options_not_a_mapping(options))
    for name in ("stage", "static_outputs", "max_tokens"):
        if name in (options or ()):
            raise errors.ConfigError(errors.runner_sets_option(name))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_proxies(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, Mapping):
        return False
    return all(isinstance(name, str) and isinstance(proxy, Proxy) for name, proxy in value.items())


def micro_batches(given: object) -> Iterator[MicroBatch]:
    """Those given to ``run``, each checked when it is its turn.

    Raises:
        ConfigError: they are no iterable, or, later, one of them is something else.
    """
    if not isinstance(given, Iterable):
        raise errors.ConfigError(errors.bad_micro_batches(given))
    return _each_checked(given)


def _each_checked(given: Iterable[object]) -> Iterator[MicroBatch]:
    for one in given:
        if not isinstance(one, MicroBatch):
            raise errors.ConfigError(errors.not_a_micro_batch(one))
        yield one


def own_arguments(whose: str, given: object, proxies: Collection[str]) -> Mapping[str, Any]:
    """The stage's own arguments that ``whose`` gave.

    Raises:
        ConfigError: they are no mapping.
        ValueError: they have what the previous stage sends.
    """
    if not isinstance(given, Mapping):
        raise errors.ConfigError(errors.inputs_not_a_mapping(whose, given))
    if clash := given.keys() & proxies:
        raise ValueError(errors.stage_inputs_clash(clash))
    return given


def ends(
    stage: int,
    stage_count: int,
    inputs: Proxies | None,
    outputs: Proxies | None,
    feedback: Proxies | None,
    finish: object,
) -> None:
    """Check that this stage has what belongs to its place, and nothing else.

    Raises:
        ConfigError: proxies that nobody sends or takes, or none where some are needed.
    """
    is_first, is_last, alone = stage == 0, stage == stage_count - 1, stage_count == 1
    for name, got, wanted in (
        ("inputs", inputs, not is_first),
        ("outputs", outputs, not is_last),
        ("feedback", feedback, None if not alone and (is_first or is_last) else False),
    ):
        if wanted is not None and bool(got) != wanted:
            raise errors.ConfigError(errors.proxies_at_wrong_end(name, list(got or ()), stage, stage_count))
    if finish is not None and not (is_last and feedback and callable(finish)):
        raise errors.ConfigError(errors.finish_cannot_be(finish, stage, stage_count, bool(feedback)))


class Turn:
    """What a runner does with its memory, one thing at a time: a micro-batch, or a warm-up.

    Raises:
        PPPiecewiseError: entered while it is held, by whichever thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        """Which holds it."""
        self.is_over = False

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise errors.PPPiecewiseError(errors.CLOSED_RUNNER if self.is_over else errors.NOT_BETWEEN_MICRO_BATCHES)
        self._thread = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._thread = None
        self._lock.release()

    def check_free(self) -> None:
        """Raises PPPiecewiseError in the thread that holds it."""
        if self._thread == threading.get_ident():
            raise errors.PPPiecewiseError(errors.NOT_BETWEEN_MICRO_BATCHES)

    def end(self, longest_seconds: float) -> bool:
        """Nobody enters it any more, once who holds it has left; whether that took no longer than it may."""
        self.is_over = self._lock.acquire(timeout=longest_seconds)
        return self.is_over

    def check_open(self) -> None:
        """Raises PPPiecewiseError after its end."""
        if self.is_over:
            raise errors.PPPiecewiseError(errors.CLOSED_RUNNER)
