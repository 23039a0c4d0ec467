"""Where values lie under Dynamo's guards, and guards of our own which say that a value there is as it was.

Tested on torch 2.11.0, 2.13.0 and 2.14.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._dynamo import guards as native
from torch._dynamo.guards import GuardManagerType

from .dynamo_sources import Unexpected, Values

_KIND = GuardManagerType.GUARD_MANAGER
OWN = "own"
_WHY = ["as it was"]
_NOTHING = object()

Comparison = Callable[[Any, Any], None]
"""Adds, to the guards of a place, that the value there is as it is now."""


def compare_class(manager: Any, value: Any) -> None:
    manager.add_type_match_guard(id(type(value)), _WHY, None)


def compare_object(manager: Any, value: Any) -> None:
    compare_class(manager, value)
    attributes = manager.get_generic_dict_manager("", value.__dict__, _KIND)
    attributes.add_dict_version_guard(value.__dict__, _WHY, None)


def compare_version(manager: Any, value: Any) -> None:
    manager.add_dict_version_guard(value, _WHY, None)


def compare_length(manager: Any, value: Any) -> None:
    manager.add_length_check_guard(len(value), _WHY, None)


def compare_taken(manager: Any, value: Any) -> None:
    """Stands for the comparison of a tensor among the graph's arguments, with all others at once."""


def compare_tensor(manager: Any, value: Any) -> None:
    sizes, strides, keys = list(value.shape), list(value.stride()), torch._C._dispatch_keys(value)
    manager.add_tensor_match_guard(value, sizes, strides, "", _WHY, None, type(value), keys)


_ORDER: dict[Comparison, int] = {compare_object: 0, compare_class: 1, compare_version: 2, compare_length: 3}


class Held(list[tuple[Comparison, Any]]):
    """What to compare how, of values that may be held: each is reached at once, in half the time."""

    @property
    def values(self) -> tuple[Any, ...]:
        return tuple(value for _, value in self)

    def compared(self) -> Any:
        """Guards on a tuple of the values. Sorted: to do like things in a row takes two thirds of the time."""
        self.sort(key=lambda one: _ORDER.get(one[0], 0))
        root = native.RootGuardManager()
        manager = root.framelocals_manager((OWN, 0), OWN, self.values, _KIND)
        for at, (how, value) in enumerate(self):
            how(manager.tuple_getitem_manager(at, "", value, _KIND), value)
        return root


class Place:
    """Where a value lies in a frame, and how guards reach it."""

    def __init__(self, parent: Place | None, accessor: str, key: Any, value: Any, *, is_own: bool) -> None:
        self.parent, self._accessor, self.key, self.value, self.is_own = parent, accessor, key, value, is_own
        self._type = type(value)
        self.path: str = f"{'' if parent is None else parent.path}.{accessor}[{key!r}]"

    @property
    def is_attributes(self) -> bool:
        return self._accessor == "get_generic_dict_manager"

    def below(self, accessor: str, key: Any, value: Any) -> Place:
        return Place(self, accessor, key, value, is_own=self.is_own)

    def forget(self) -> None:
        """Keep nothing alive that belongs to a call."""
        place: Place | None = self
        while place is not None:
            place.value = None
            place = place.parent

    def find(self, found: dict[int, There], root: Any, values: Values) -> There:
        """What lies here in another call, and the guards of it under ``root``; ``found`` has what was found before."""
        there = found.get(id(self))
        if there is None:
            there = found[id(self)] = self._find(found, root, values)
            self._check_type(there.value)
        return there

    def value_in(self, found: dict[int, There], root: Any, values: Values) -> Any:
        """What lies here in another call; there need be no guards of it."""
        if self.parent is None or self.is_attributes:
            return self.find(found, root, values).value
        value = self._item(self.parent.find(found, root, values).value)
        self._check_type(value)
        return value

    def _check_type(self, value: Any) -> None:
        if type(value) is not self._type:
            raise Unexpected("an object among the arguments is not like one that was seen before")

    def _item(self, above: Any) -> Any:
        try:
            return above[self.key]
        except (LookupError, TypeError):
            return _NOTHING

    def _find(self, found: dict[int, There], root: Any, values: Values) -> There:
        if self.parent is None:
            value = values[self.key]
            return There(value, root.framelocals_manager((self.key, list(values).index(self.key)), "", value, _KIND))
        above = self.parent.find(found, root, values)
        if self.is_attributes:
            value = getattr(above.value, "__dict__", None)
            return There(value, above.manager.get_generic_dict_manager("", value, _KIND))
        value = self._item(above.value)
        return There(value, getattr(above.manager, self._accessor)(self.key, "", value, _KIND))


@dataclass(frozen=True)
class There:
    value: Any
    manager: Any
