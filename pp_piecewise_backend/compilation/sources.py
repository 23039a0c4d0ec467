"""Which argument a placeholder is: names of parameters and fields behind closures, wrappers and ``*args``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from types import CellType, CodeType, MethodType
from typing import TypeAlias

import torch

from ..utils import torch_compat

AccessPath: TypeAlias = tuple[str | int, ...]
"""The way to a value from the traced frame: names of variables and attributes, keys, positions."""
Frame: TypeAlias = tuple[CodeType, Mapping[str, object]]
"""The code of the traced frame, and its variables by name."""

_DEEPEST_WRAPPER = 16
"""How far to look through functions and modules that pass ``*args`` on; bounds those that refer to themselves."""

_COMPONENT = re.compile(r"\['([^']*)'\]|\[\"([^\"]*)\"\]|\.([A-Za-z_]\w*)|\[(-?\d+)\]")


def argument_path(source: str, frame: Frame | None) -> AccessPath:
    """The way to what ``source`` means, with positions turned into names where the frame has them.

    Args:
        source: where Dynamo takes an input from, as a Python expression in the frame.
        frame: None outside of Dynamo; positions then stay as they are.
    """
    path: AccessPath = tuple(
        int(index) if index else (key or quoted or attribute)
        for key, quoted, attribute, index in _COMPONENT.findall(source)
    )
    return path if frame is None or not path else _named(path, *frame)


def readable(source: str, path: AccessPath, frame: Frame | None) -> str:
    """What ``source`` means, as a reader knows it: ``self.layers.0.weight``, and ``hidden_states`` for an argument.

    It reads as if the traced frame were the user's, also where a wrapper, of the user's or of Dynamo, was traced.

    Args:
        source: as ``argument_path`` takes it, and frame, too.
        path: what that gave.
    """
    first = _COMPONENT.match(source, 1) if source[:1] in ("L", "G") else None
    if first is not None:
        name, end = first[1] or first[2], first.end()
        if frame is not None and name == "fn" and torch_compat.module_in_wrapper(*frame) is not None:
            name = "self"
        elif (second := _COMPONENT.match(source, end)) is not None and path[0] != name:
            name, end = str(path[0]), second.end()
        source = f"{name}{source[end:]}"
    return re.sub(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", source)


def _named(path: AccessPath, code: CodeType, values: Mapping[str, object]) -> AccessPath:
    """Turn positions into names: of the wrapped function's parameters, and of named tuples' fields."""
    start: object = values
    _, variadic, keywords = inspect.getargs(code)
    if path[0] == keywords and len(path) > 1:
        path, start = path[1:], values.get(str(path[0]))
    elif path[0] == variadic and len(path) > 1 and isinstance(path[1], int):
        arguments = values.get(str(path[0]))
        start = arguments
        name = _parameter_name(code, values, code.co_argcount + path[1])
        if name is not None and isinstance(arguments, (tuple, list)):
            start = {name: arguments[path[1]]}
            path = (name, *path[2:])
    named: list[str | int] = []
    holder = start
    for part in path:
        fields = getattr(holder, "_fields", None)
        named.append(fields[part] if isinstance(part, int) and fields is not None else part)
        holder = _step_into(holder, part)
    return tuple(named)


def _step_into(holder: object, part: str | int) -> object:
    try:
        if isinstance(holder, Mapping) or isinstance(part, int):
            return holder[part]  # type: ignore[index]
        return getattr(holder, part)
    except (AttributeError, KeyError, IndexError, TypeError):
        return None


def _parameter_name(code: CodeType, values: Mapping[str, object], position: int) -> str | None:
    """Name of the wrapped function's positional parameter, for a wrapper that takes ``*args``."""
    wrapped = [(values[name], position) for name in code.co_freevars if name in values]
    arguments = values.get(inspect.getargs(code).varargs or "")
    leading = values.get(code.co_varnames[0]) if code.co_argcount else next(iter(arguments or ()), None)  # type: ignore
    if isinstance(leading, torch.nn.Module) and position > 0:
        wrapped.append((leading, position - 1))
    names = (_positional_name(function, at, _DEEPEST_WRAPPER) for function, at in wrapped)
    return next((name for name in names if name is not None), None)


def _positional_name(function: object, position: int, depth: int) -> str | None:
    """Name of the parameter that takes a positional argument, looked for through wrappers of ``*args``."""
    if not callable(function) or depth == 0:
        return None
    if isinstance(function, torch.nn.Module):
        # A module around one other passes its arguments on.
        inner = list(function.children())
        return _positional_name(function.forward, position, depth - 1) or (
            _positional_name(inner[0], position, depth - 1) if len(inner) == 1 else None
        )
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # Python cannot tell, as of builtins
        return None
    if position < len(parameters) and parameters[position].kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        return parameters[position].name
    if not any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    if isinstance(function, MethodType):
        return _positional_name(function.__func__, position + 1, depth - 1)
    cells = getattr(function, "__closure__", None) or ()
    names = (_positional_name(_cell_contents(cell), position, depth - 1) for cell in cells)
    return next((name for name in names if name is not None), None)


def _cell_contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
