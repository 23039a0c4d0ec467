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
        text = ast.unparse(node)
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
        raise Unexpected(f"a value comes from {ast.unparse(node)}")

    found = [f"found[{at}] = {read(_parsed(s))}" for at, s in enumerate(sources) if s not in known]
    constants["template"] = [known.get(source) for source in sources]
    text = "\n".join(
        ["def read(L):", "    found = template.copy()", *lines, *(f"    {f}" for f in found), "    return found"]
    )
    exec(compile(text, "<values of a frame>", "exec"), constants)
    function: Read = constants["read"]
    return function


def are_the_same(
    sources: Sequence[str], scope: Values, known: Mapping[str, Any], values: Values
) -> Callable[[Values], bool]:
    """Whether the same objects lie at these places as in the call with these values, which are kept alive.

    The other arguments and what is raised are those of `reader`.
    """
    read = reader(sources, scope, known)
    expected = read(values)

    def are_same(others: Values) -> bool:
        try:
            return all(map(is_, read(others), expected))
        except Exception:  # nothing lies there any more
            return False

    return are_same


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
