"""What Dynamo made of one code object: under which guards it runs which bytecode.

Tested on torch 2.11.0, 2.13.0 and 2.14.1. Whatever is not as expected here raises, and who asks goes through Dynamo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any

import torch
from torch._dynamo.bytecode_transformation import create_call_function, create_load_const, transform_code_object
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

from .dynamo_guards import Changes, Guards
from .dynamo_sources import Unexpected, Values

_eval_frame = torch._dynamo.eval_frame
_has_any_global_hook = torch.nn.modules.module._has_any_global_hook


class Frame:
    """One bytecode of Dynamo's for a code object, and its guards."""

    def __init__(self, manager: Any, code: CodeType) -> None:
        self._manager = manager
        self.code = code

    @property
    def is_in_use(self) -> bool:
        """Whether Dynamo still has it: not after a reset, nor when an object is gone that its guards name."""
        return self._manager.cache_entry is not None

    def admits(self, values: Values) -> bool:
        """Whether all guards hold."""
        return bool(self._manager.check(values))

    def guards(
        self,
        values: Values,
        scope: dict[str, Any],
        known: Sequence[str],
        call: str,
        taken: Sequence[str],
        changes: Changes,
    ) -> Guards:
        """Its guards in parts; the arguments and what is raised are those of `Guards`."""
        return Guards(self._manager, values, scope, known, call, taken, changes)


def frames_of(code: CodeType) -> list[Frame]:
    """What Dynamo holds for a code object."""
    return [Frame(entry.guard_manager, entry.code) for entry in _debug_get_cache_entry_list(code)]


def runs_compiled_code_freely() -> bool:
    """Whether nothing in this thread or process asks Dynamo not to run what it compiled, or to run more than that."""
    stance = _eval_frame._stance
    return (
        stance.stance == "default"
        and stance.backend is None
        and not stance.skip_guard_eval_unsafe
        and not _has_any_global_hook()
    )


# ------------------------------------------------------------------------------------------- bytecode

_GRAPH_OUTPUT = "graph_out_0"
_PROLOGUE = frozenset({"COPY_FREE_VARS", "MAKE_CELL", "RESUME", "NOP"})
_LOADS = frozenset(
    {"LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_CONST", "LOAD_SMALL_INT"}
    | {"LOAD_ATTR", "LOAD_METHOD", "BINARY_SUBSCR", "STORE_FAST", "DELETE_FAST", "COPY", "DUP_TOP", "SWAP", "ROT_TWO"}
    | {"POP_TOP", "PUSH_NULL", "NOP", "CACHE", "EXTENDED_ARG", "PRECALL", "CALL", "CALL_FUNCTION", "CALL_METHOD"}
)
"""Instructions that change nothing but the frame's own variables."""
_CALLS = frozenset({"CALL", "CALL_FUNCTION", "CALL_METHOD"})
_READS = frozenset(
    {"call_size", "call_stride", "call_storage_offset"}
    | {"record_pregraph_bytecode_enter", "record_pregraph_bytecode_exit"}
)
"""Functions of Dynamo's that only read, or mark the time for profilers."""


class _Called(Exception):
    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.arguments = arguments


def compiled_name(code: CodeType) -> str:
    """The global under which a bytecode of Dynamo's finds the one callable that a backend gave it."""
    names = [name for name in code.co_names if name.startswith("__compiled_fn")]
    if len(names) != 1:
        raise Unexpected(f"it calls {len(names)} graphs")
    return names[0]


def compiled_callable(function: FunctionType) -> Any:
    """What a backend returned for the graph that a function with Dynamo's bytecode calls."""
    found = function.__globals__[compiled_name(function.__code__)]
    return getattr(found, "_torchdynamo_orig_callable", found)


def graph_arguments(function: FunctionType, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """What a function with Dynamo's bytecode calls its graph with; the graph is not run."""

    def record(*arguments: Any) -> None:
        raise _Called(arguments)

    scope = {**function.__globals__, compiled_name(function.__code__): record}
    recording = FunctionType(function.__code__, scope, function.__name__, None, function.__closure__)
    try:
        recording(*args, **kwargs)
    except _Called as called:
        return called.arguments
    raise Unexpected("it does not call its graph")


def after_graph(function: FunctionType, run: Callable[[], Any], argument_count: int) -> FunctionType:
    """The same function, which gets the graph's results from ``run`` and loads nothing for the graph.

    What Dynamo does with the results, side effects included, is done as before.

    Raises:
        Unexpected: before it calls the graph it does more than load arguments, or it needs later what it loaded then.
    """

    def change(instructions: list[Any], options: dict[str, Any]) -> None:
        at = [i for i, one in enumerate(instructions) if (one.opname, one.argval) == ("STORE_FAST", _GRAPH_OUTPUT)]
        start = next((i for i, one in enumerate(instructions) if one.opname not in _PROLOGUE), 0)
        if len(at) != 1:
            raise Unexpected("its bytecode stores no one result of a graph")
        end = store = at[0]
        while end > start and instructions[end - 1].opname == "DELETE_FAST":
            end -= 1
        call, dropped, kept = instructions[end - 1], instructions[start : end - 1], instructions[store:]
        if call.opname not in _CALLS or call.arg != argument_count:
            raise Unexpected("its bytecode calls a graph in another way")
        if not _only_loads(dropped):
            raise Unexpected("its bytecode does more than load arguments before the graph")
        ids = set(map(id, kept))
        if any(one.exn_tab_entry is not None for one in instructions) or any(
            one.target is not None and id(one.target) not in ids for one in instructions
        ):
            raise Unexpected("its bytecode has branches around the graph")
        undefined = {one.argval for one in dropped if one.opname == "STORE_FAST"}
        for one in kept:
            if one.opname == "STORE_FAST":
                undefined.discard(one.argval)
            elif one.opname in _LOADS and one.argval in undefined and one.opname.startswith(("LOAD_FAST", "DELETE")):
                raise Unexpected("its bytecode needs later what it loaded for the graph")
        instructions[start:store] = [
            create_load_const(run, checked=False),
            *create_call_function(0, True),
        ]

    # Of a copy: Dynamo remembers what it has taken apart, and drops the graph only when its own code is gone.
    code, _ = transform_code_object(function.__code__.replace(), change)
    return FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


def _only_loads(instructions: Sequence[Any]) -> bool:
    """Whether these change nothing; each call is then one of a function of Dynamo's that is known not to."""
    names = [one.opname for one in instructions]
    held: set[str] = set()
    used = 0
    for at, one in enumerate(instructions):
        if one.opname in ("LOAD_ATTR", "LOAD_METHOD") and one.argval in _READS:
            used += 1
            if names[at + 1 : at + 3] in (["COPY", "STORE_FAST"], ["DUP_TOP", "STORE_FAST"]):
                held.add(instructions[at + 2].argval)
        elif one.opname.startswith("LOAD_FAST") and one.argval in held:
            used += 1
    return set(names) <= _LOADS and used == sum(name in _CALLS for name in names)
