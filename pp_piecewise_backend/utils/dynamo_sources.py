"""Where values lie in a frame, in Dynamo's words: expressions over its variables ``L`` and its globals ``G``."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

Values = Mapping[str, Any]
"""Local variables and closure of a call, by name."""

Read = Callable[[Values], list[Any]]


class Unexpected(Exception):
    """What Dynamo made is not of a kind that is known here."""


def reader(sources: Sequence[str], scope: Values, known: Mapping[str, Any]) -> Read:
    """A function from a frame's variables to what lies at these places.

    Args:
        scope: the frame's globals.
        known: expressions -> what lies there in every call; it is not looked up again.

    Raises:
        Unexpected: a place is not one of attributes, items, sizes and types of the frame's values.
    """
    lines: list[str] = []
    names: dict[str, str] = {"L": "L", "G": "G"}
    constants: dict[str, Any] = {"G": scope}

    def read(node: ast.expr) -> str:
        text = _text(node)
        if text not in names:
            if text in known:
                names[text] = f"k{len(names)}"
                constants[names[text]] = known[text]
            else:
                expression = written(node)
                names[text] = f"v{len(names)}"
                lines.append(f"    {names[text]} = {expression}")
        return names[text]

    def written(node: ast.expr) -> str:
        match node:
            case ast.Attribute(value, name):
                return f"{read(value)}.{name}"
            case ast.Subscript(value, ast.Constant(key)):
                return f"{read(value)}[{key!r}]"
            case ast.Call(ast.Attribute(value, ("size" | "stride" | "storage_offset") as name), [], []):
                return f"{read(value)}.{name}()"
            case ast.Call(ast.Name("type"), [value], []):
                return f"type({read(value)})"
            case ast.Call(ast.Name("dict"), [ast.Attribute(_, "__dict__") as value], []):
                return read(value)  # of a class: its items are those of a copy
            case ast.Compare(ast.Constant(key), [ast.In()], [value]):
                return f"{key!r} in {read(value)}"
        raise Unexpected(f"a value comes from {ast.unparse(node)}")

    found = [f"found[{at}] = {read(_parsed(s))}" for at, s in enumerate(sources) if s not in known]
    constants["template"] = [known.get(source) for source in sources]
    text = "\n".join(
        ["def read(L):", "    found = template.copy()", *lines, *(f"    {f}" for f in found), "    return found"]
    )
    exec(compile(text, "<values of a frame>", "exec"), constants)
    function: Read = constants["read"]
    return function


class Same:
    """Whether the same objects lie at some places as in one call; they are kept alive.

    The arguments, and what is raised, are those of `reader`.
    """

    def __init__(self, sources: Sequence[str], scope: Values, known: Mapping[str, Any], values: Values) -> None:
        self._sources = sources
        self._read = read = reader(sources, scope, known)
        self._expected = expected = read(values)

        def are_there(others: Values) -> bool:
            try:
                return all(map(is_, read(others), expected))
            except Exception:  # nothing lies there any more
                return False

        self.are_there: Callable[[Values], bool] = are_there

    def others(self, values: Values) -> list[str]:
        """Where another object lies in this call; none are known where nothing lies at one of the places."""
        try:
            found = self._read(values)
        except Exception:
            return []
        return [s for s, one, was in zip(self._sources, found, self._expected, strict=True) if one is not was]


def is_readable(source: str) -> bool:
    """Whether `reader` takes the place."""
    try:
        reader([source], {}, {})
    except Unexpected:
        return False
    return True


def _parsed(source: str) -> ast.expr:
    try:
        return ast.parse(source, mode="eval").body
    except SyntaxError:
        raise Unexpected(f"a value comes from {source}") from None


def _text(node: ast.expr) -> str:
    """The expression; that of a long one is put together once, not once for each of its ends."""
    text: str | None = getattr(node, "own_text", None)
    if text is None:
        match node:
            case ast.Attribute(value, name):
                text = f"{_text(value)}.{name}"
            case ast.Subscript(value, ast.Constant(str() | int() as key)):
                text = f"{_text(value)}[{key!r}]"
            case _:
                text = ast.unparse(node)
        node.own_text = text  # type: ignore[attr-defined]
    return text
