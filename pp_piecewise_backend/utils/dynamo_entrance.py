"""How a call enters a compiled stage: without Dynamo, where all that Dynamo guards is known to hold.

Note [no second entrance]
Dynamo's own entrance asks every guard of the stage in every call and loads every parameter again: hundreds of
microseconds for tens of layers, far more than the program itself takes on the host. A call of a kind that was seen
before goes a way that was learned from Dynamo's own guards and bytecode, see Note [what need not be asked again]:

- Dynamo's guards are asked but for those that the versions of the module's dicts answer for, or that the same objects
  lie in them, see Note [what changes in every call].
- Parameters and buffers are bound. They are the same objects while these answers hold; what the program must know of
  their memory it checks itself. What comes with the call is read where Dynamo would read it.
- What Dynamo does with the graph's results, side effects included, is its own bytecode.

Whatever else a call may be, it takes Dynamo's entrance as before, and is then learned from. So nothing is decided here
that Dynamo would not decide alike.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from types import FunctionType
from typing import Any

import torch
from torch import nn

from . import dynamo_frames
from .counters import Amounts, Stats, counted
from .dynamo_frames import Frame
from .dynamo_guards import Changes, Objects
from .dynamo_sources import Unexpected, Values, reader

_LOG = logging.getLogger(__name__)

MAX_OBJECTS = 256
"""Sets of objects among the arguments, such as caches, that are remembered; those seen first go first."""

CALLS_THAT_PAY = 16
"""Direct entries after which it has paid to learn from a call."""

LEARNED_ON_CREDIT = 8
"""Times in a row that a call may be learned from and not pay before the next time waits, each time twice as long."""

MAX_WAIT_CALLS = 1024
"""Calls through Dynamo for which learning waits at most."""

TIMED_CHECKS = 5
"""Times that the checks of a new way are timed, of which the shortest counts."""

_ONE_ENTRY = Amounts({"direct_entries": 1})

_stage_numbers = itertools.count()

Arguments = Mapping[str, Any]


def cloning(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The module, given a clone of each proxy, in a frame of its own.

    Dynamo keeps programs and their limits by code object, so each stage of a process needs one.
    """

    def forward(self: Any, **arguments: Any) -> Any:
        # In a dict of their own: what is put into ``arguments``, Dynamo has the graph return.
        clones = {name: arguments[name].clone() for name in names}
        for name in names[1:]:
            torch._check(arguments[name].size(0) == arguments[names[0]].size(0))
        return self.module(**{**arguments, **clones})

    name = f"{type(module).__name__}_{next(_stage_numbers)}"
    own = FunctionType(forward.__code__.replace(co_name=name), forward.__globals__, name, None, forward.__closure__)
    wrapper = type(name, (nn.Module,), {"forward": own})()
    wrapper.module = module
    wrapper.train(module.training)
    return wrapper


class Entrance:
    """Calls a stage that was compiled as one graph.

    Args:
        module: what ``cloning`` returned.
        compiled: the same, compiled.
        inputs_of: from what Dynamo calls for a graph to where each of its inputs lies, as expressions in the frame of
            the module; None for what is not known.
    """

    def __init__(
        self,
        module: nn.Module,
        compiled: Callable[..., Any],
        inputs_of: Callable[[Any], Sequence[str] | None],
        stats: Stats,
    ) -> None:
        self._module = module
        self._compiled = compiled
        self._inputs_of = inputs_of
        self._stats = stats
        self._forward: Any = type(module).forward
        names, cells = self._forward.__code__.co_freevars, self._forward.__closure__ or ()
        self._closure = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
        self._ways: list[_Way] = []
        """One for each frame of Dynamo's; that of the last call first."""
        self._entries = self._in_vain = self._waited = 0
        """Direct entries since a call was learned from, such times that did not pay, and calls that waited since."""
        self._has_paid = False
        """Whether it had paid to learn from a call when the next one was learned from."""
        self._changes = Changes()
        """What was found to change between calls, of all ways."""
        self.why_not = "no call was learned from yet"
        """Why the last call that was to be learned from goes through Dynamo; empty where it was learned."""
        self._check_us = 0.0
        """What the checks of a direct entry take, measured when a way was learned."""

    def __call__(self, arguments: Arguments) -> Any:
        if dynamo_frames.runs_compiled_code_freely():
            values = self._values(arguments)
            for way in self._ways:
                if way.admits(values):
                    if way is not self._ways[0]:
                        self._ways.remove(way)
                        self._ways.insert(0, way)
                    self._entries += 1
                    _ONE_ENTRY.add_to(self._stats)
                    return way.go(arguments)
        output = self._compiled(**arguments)
        if self._is_to_learn():
            self.learn(arguments)
        return output

    def _values(self, arguments: Arguments) -> dict[str, Any]:
        return {"self": self._module, "arguments": arguments, **self._closure}

    def _is_to_learn(self) -> bool:
        self._waited += 1
        has_paid = self._entries >= CALLS_THAT_PAY
        if has_paid:
            self._in_vain = 0
        if self._waited < min(2 ** max(0, self._in_vain - LEARNED_ON_CREDIT), MAX_WAIT_CALLS):
            return False
        self._in_vain += 1
        self._entries = self._waited = 0
        self._has_paid = has_paid
        return True

    def learn(self, arguments: Arguments) -> None:
        """Learn the way of calls like this one, which Dynamo has run before."""
        values = self._values(arguments)
        self._ways = [way for way in self._ways if way.frame.is_in_use]
        try:
            frames = dynamo_frames.frames_of(self._forward.__code__)
            frame = next((frame for frame in frames if frame.admits(values)), None)
            if frame is None:
                raise Unexpected("Dynamo would compile for another call like it")
            way = next((way for way in self._ways if way.frame.code is frame.code), None)
            if way is None or self._finds_changes(way, values) or not way.meets(values):
                self._ways = [other for other in self._ways if other is not way]
                self._ways.append(way := _Way(frame, self._forward, self._inputs_of, values, self._changes))
                self._check_us = min(_seconds(way.admits, values) for _ in range(TIMED_CHECKS)) * 1e6
        except Exception as error:
            # Whatever it is: Dynamo's entrance is right.
            self.why_not = str(error) if isinstance(error, Unexpected) else f"{type(error).__name__}: {error}"
            _LOG.debug("a stage is entered through Dynamo: %s", self.why_not, exc_info=True)
        else:
            self.why_not = ""

    def _finds_changes(self, way: _Way, values: Values) -> bool:
        """Whether this call shows what changes between calls of the way and was not known to."""
        found = way.changes(values)
        if self._has_paid:  # what is another object now and then is learned again, and cheap in between
            found = dataclasses.replace(found, places=frozenset())
        if found == Changes() and way.has_objects and self._in_vain > LEARNED_ON_CREDIT:
            found = Changes(objects=True)
        if found | self._changes == self._changes:
            return False
        self._changes |= found
        self._in_vain = 0
        return True

    def summary(self) -> str:
        """How calls entered, what that costs, and why others go through Dynamo; in one line."""
        stats = self._stats.snapshot()
        text = f"{stats.direct_entries} of {counted(stats.microbatches, 'micro-batch', 'micro-batches')} without Dynamo"
        if self._ways:
            text += f", after checks that take {self._check_us:.0f} us"
        return f"{text}; the last that was learned from goes through Dynamo: {self.why_not}" if self.why_not else text

    def forget(self) -> None:
        """Keep neither the module nor what is known of it; it is not called any more."""
        for way in self._ways:
            vars(way).clear()  # which its function refers to
        vars(self).clear()

    def knows(self, arguments: Arguments) -> bool:
        """Whether a call with these arguments would go a way that was learned."""
        values = self._values(arguments)
        return dynamo_frames.runs_compiled_code_freely() and any(way.admits(values) for way in self._ways)


class _Way:
    """How calls that one frame of Dynamo's admits are made without it, learned from one of them."""

    def __init__(
        self,
        frame: Frame,
        forward: Any,
        inputs_of: Callable[[Any], Sequence[str] | None],
        values: Values,
        changes: Changes,
    ) -> None:
        self.frame = frame
        whole = FunctionType(frame.code, forward.__globals__, forward.__name__, None, forward.__closure__)
        self._graph = dynamo_frames.compiled_callable(whole)
        sources = inputs_of(self._graph)
        if sources is None:
            raise Unexpected("its graph was not split")
        self._guards = guards = frame.guards(
            values, forward.__globals__, known=("self",), call="arguments", taken=sources, changes=changes
        )
        self._objects: OrderedDict[tuple[int, ...], Objects] = OrderedDict()
        """By the ids of those among the arguments of a call."""
        module, arguments = values["self"], values["arguments"]
        taken = dynamo_frames.graph_arguments(whole, module, **arguments)
        self._read = reader(sources, forward.__globals__, guards.own_tensors)
        self._given = _picker([sources.index(source) for source in guards.taken])
        """Takes, from the graph's arguments, the tensors of objects that are among them."""
        same = guards.own_tensors.keys() | guards.given_tensors
        self._fresh = [at for at, source in enumerate(sources) if source not in same]
        """Positions of the graph's arguments that may be any tensor, as long as it is none of the others."""
        self._taken: Sequence[Any] = ()
        self._run = dynamo_frames.after_graph(whole, self._run_graph, len(sources))
        self._module = module
        found = self._read(values)
        if len(found) != len(taken) or not all(map(_are_one, found, taken)):
            raise Unexpected("the graph's arguments do not lie where Dynamo says")
        if not self.meets(values):
            raise Unexpected("the module or its arguments change in every call")

    def meets(self, values: Values) -> bool:
        """Remember the objects among the arguments of a call that the frame admits; whether calls like it go this way.

        Raises:
            Unexpected: such objects were not seen before.
        """
        key = self._key(values["arguments"])
        self._objects[key] = self._guards.of_objects(values)
        self._objects.move_to_end(key)
        if len(self._objects) > MAX_OBJECTS:
            self._objects.popitem(last=False)
        return self.admits(values) and self.frame.admits(values)

    @property
    def has_objects(self) -> bool:
        """Whether it remembers objects among the arguments."""
        return bool(self._guards.objects)

    def changes(self, values: Values) -> Changes:
        """What of the module is another one in a call that the frame admits than when the way was learned."""
        return self._guards.changes(values)

    def _key(self, arguments: Arguments) -> tuple[int, ...]:
        return tuple([id(arguments.get(name)) for name in self._guards.objects])

    def admits(self, values: Values) -> bool:
        """Whether a call with these values goes this way; then ``go`` may follow."""
        objects = self._objects.get(self._key(values["arguments"]))
        if objects is None or not self.frame.is_in_use or not self._guards.hold(values, objects):
            return False
        self._taken = taken = self._read(values)
        return objects.check_taken(*self._given(taken)) and _are_others(
            objects.tensor_ids, [id(taken[at]) for at in self._fresh]
        )

    def go(self, arguments: Arguments) -> Any:
        """What the module returns."""
        return self._run(self._module, **arguments)

    def _run_graph(self) -> Any:
        taken, self._taken = self._taken, ()
        return self._graph(*taken)


def _picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda values: [values[at] for at in positions]


def _seconds(call: Callable[[Values], object], values: Values) -> float:
    begin = time.perf_counter()
    call(values)
    return time.perf_counter() - begin


_are_others = frozenset.isdisjoint


def _are_one(found: Any, taken: Any) -> bool:
    return found is taken or (type(found) is type(taken) is int and found == taken)
