"""What Dynamo's guards of a frame ask, and what of it need not be asked in every call.

Tested on torch 2.11.0, 2.13.0 and 2.14.1. Whatever is not as expected here raises, and who asks goes through Dynamo.

Note [what need not be asked again]
Dynamo's guards of a stage are a tree over its module and its arguments, and nearly all of it is about the module. A
guard need not be asked again while what it looks at is known to be the same: attributes of an object lie in its dict,
and a dict whose version is the same is the same dict with the same values. So one version stands for all guards on what
the dict holds, as far as these values cannot change themselves: numbers, texts, and objects of which the same is known.
What is known of a tensor from its place is that it is the same object; dtype, sizes and the like are compared again.
Any other guard is asked in every call. Many only ask whether a global, or an attribute of a class, is the same object,
or one of the same class: what lies there is read in every call by a function that has all these expressions, and
compared. The rest, such as those on the sizes of arguments, is asked by a copy of Dynamo's tree without the branches
that are answered otherwise. When in doubt, a branch stays.

How much memory is looked at decides what all this costs, since the work between two calls empties the processor's
caches: what a function reads, and one guard of many tensors, lies in a row; a node of Dynamo's tree in several places.

Two things are not compared: marks of dynamic dimensions on tensors, which matter only to who compiles, and whether a
class still has an attribute that its other objects had, which is asked of one object of the class.

Note [what changes in every call]
Objects of a stage count, or keep what is current, while nothing that Dynamo guards is another. So a dict whose version
is another one although the guards hold is compared by its version no more. Of whatever guards look at in it, each call
asks whether the same object lies there, from which follows the same as from a version, and of the keys that guards name
whether the dict has them. A list has no version: what lies in it is always asked for. Where another object lies in call
after call, Dynamo's own guards are asked, of it and of all below; likewise of objects among the arguments if, in call
after call, these are others. So after two or three calls is known what changes, and then it costs little.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch._C._dynamo import guards as native

from .dynamo_places import (
    OWN,
    Comparison,
    Held,
    Place,
    There,
    compare_class,
    compare_length,
    compare_object,
    compare_taken,
    compare_tensor,
    compare_version,
)
from .dynamo_sources import Same, Unexpected, Values, is_readable, reader

_LEAVES = frozenset(
    {"TYPE_MATCH", "ID_MATCH", "EQUALS_MATCH", "NONE_MATCH", "TRUE_MATCH", "FALSE_MATCH", "LENGTH_CHECK"}
    | {"DICT_CONTAINS", "DICT_LENGTH", "DICT_VERSION"}
)
"""Guards that only depend on which object they look at and, for a dict, on what it holds."""

_LEAVES_OF_TENSORS = frozenset({"TENSOR_MATCH", "NO_TENSOR_ALIASING", "DIMENSION_DYNAMIC_MARKING_GUARD"})
"""Those of a tensor that are compared here, or that are marks of dynamic dimensions."""

_UNCHANGING = (int, bool, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout)
_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass(frozen=True)
class Changes:
    """What is another one from call to call although Dynamo's guards hold, see Note [what changes in every call]."""

    dicts: frozenset[str] = frozenset()
    """Paths of dicts of the module in which something else lies."""
    places: frozenset[str] = frozenset()
    """Expressions in the frame, at which another object lies."""
    objects: bool = False
    """Whether objects among the arguments are others, or change."""

    def __or__(self, other: Changes) -> Changes:
        return Changes(self.dicts | other.dicts, self.places | other.places, self.objects or other.objects)


class Guards:
    """Guards of a frame in parts, which hold together exactly if all its guards hold.

    Args:
        manager: Dynamo's, of the frame.
        values: those of a call that the guards admit.
        scope: the frame's globals.
        known: local variables whose value is the same in every call.
        call: the local variable that holds the dict of the call's arguments.
        taken: where the graph's arguments lie, which whoever asks reads in each call.
        changes: what is known not to stay as it is.

    Raises:
        Unexpected: the tree has parts that are not known here.
    """

    def __init__(
        self,
        manager: Any,
        values: Values,
        scope: dict[str, Any],
        known: Sequence[str],
        call: str,
        taken: Container[str],
        changes: Changes = Changes(),
    ) -> None:
        division = _Division(manager.root, values, scope, known, call, taken, changes)
        self.own_tensors: Mapping[str, torch.Tensor] = division.own_tensors
        """Expressions in the frame -> tensors that lie there as long as what ``hold`` compares is the same."""
        self.given_tensors = frozenset(division.given_tensors)
        """Where such tensors lie that belong to objects among the arguments."""
        self.objects: tuple[str, ...] = tuple(division.objects)
        """Names of the arguments that are such objects."""
        self.taken: tuple[str, ...] = tuple(division.taken)
        """Where tensors of such objects lie that `Objects` compares among the graph's arguments."""
        self._others, self._same = division.others(), division.same
        self._sources, self._versions = division.questions, division.versions
        self._own = division.own.compared()
        self._own_values = {OWN: division.own.values}
        self._own_tensors = tuple({id(tensor): tensor for tensor in division.own_tensors.values()}.values())
        self._check_own_tensors = _check_of(self._own_tensors)
        self._given = division.given
        for place, _ in self._given:
            place.forget()

    def of_objects(self, values: Values) -> Objects:
        """What is compared of the objects among the arguments, which the guards must admit.

        Raises:
            Unexpected: they are not of the kind of those that the guards were divided for.
        """
        root = native.RootGuardManager()
        found: dict[int, There] = {}
        ids: set[int] = set()
        taken: list[torch.Tensor] = []
        for place, comparison in self._given:
            value = place.value_in(found, root, values)
            if comparison is compare_taken:
                taken.append(value)
            elif comparison is not None:
                comparison(place.find(found, root, values).manager, value)
            if isinstance(value, torch.Tensor):
                ids.add(id(value))
        ids.update(map(id, self._own_tensors))
        return Objects(root if self._given else None, frozenset(ids), _check_of(taken))

    def hold(self, values: Values, objects: Objects) -> bool:
        """Whether all guards of the frame hold for this call, with these objects among its arguments.

        What ``objects`` says of the graph's arguments comes on top.
        """
        given = objects.root
        return bool(
            self._others.check(values)
            and self._same.are_there(values)
            and self._own.check(self._own_values)
            and self._check_own_tensors(*self._own_tensors)
            and (given is None or given.check(values))
        )

    def changes(self, values: Values) -> Changes:
        """What of the module is another one in this call, which Dynamo's guards admit, than when they were divided."""
        dicts = frozenset(path for path, held, version in self._versions if native.dict_version(held) != version)
        others = (self._sources[question] for question in self._same.others(values))
        return Changes(dicts, frozenset().union(*others))


def _check_of(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Whether other tensors are to guards as these, which are all different, are now."""
    if not tensors:
        return lambda: True
    sizes: list[Any] = [list(tensor.size()) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    guards = native.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    check: Callable[..., bool] = guards.check
    return check


@dataclass(frozen=True)
class Objects:
    """Objects among the arguments of a call; they are not kept alive."""

    root: Any
    """Compares them; None where there are none."""
    tensor_ids: frozenset[int]
    """Ids of all tensors that are the same ones while what is compared is the same; they live as long."""
    check_taken: Callable[..., bool]
    """Whether those of them that are among the graph's arguments, at ``Guards.taken``, are as they were."""


@dataclass(frozen=True)
class _Node:
    """A node of Dynamo's tree: what is asked of one value."""

    source: str
    leaves: tuple[tuple[str, Any], ...]
    """Kind of each guard, and the guard."""
    children: tuple[tuple[Any, _Node], ...]
    """By their accessors."""
    entries: Mapping[int, tuple[_Node | None, ...]]
    """Position -> key and value, of a dict whose order is looked at."""
    is_ordered: bool
    """Whether it also asks how many entries a dict has."""
    is_root_with_versions: bool

    @staticmethod
    def read(manager: Any) -> _Node:
        is_ordered = isinstance(manager, native.DictGuardManager)
        pairs = manager.get_key_value_managers() if is_ordered else {}
        leaves = [(type(leaf).__name__, leaf) for leaf in manager.get_leaf_guards()]
        if isinstance(manager, native.RootGuardManager):
            leaves += [("LAMBDA_GUARD", leaf) for leaf in manager.get_epilogue_lambda_guards()]
        children = zip(manager.get_accessors(), manager.get_child_managers(), strict=True)
        return _Node(
            manager.get_source(),
            tuple(leaves),
            tuple((accessor, _Node.read(child)) for accessor, child in children),
            {at: tuple(None if one is None else _Node.read(one) for one in pair) for at, pair in pairs.items()},
            is_ordered,
            bool(manager.is_tag_safe_root()),
        )

    @functools.cached_property
    def below(self) -> tuple[_Node, ...]:
        of_entries = (node for pair in self.entries.values() for node in pair if node is not None)
        return (*(child for _, child in self.children), *of_entries)

    def all_below(self) -> Iterator[_Node]:
        for node in self.below:
            yield node
            yield from node.all_below()

    @functools.cached_property
    def asks(self) -> frozenset[str]:
        """Kinds of what it asks itself; nothing if it is enough to ask what is below."""
        kinds = {kind for kind, _ in self.leaves}
        if self.is_ordered:
            kinds.add("how many entries it has")
        return frozenset(kinds) if kinds or self.below else frozenset({"that it is there"})

    @functools.cached_property
    def all_sources(self) -> frozenset[str]:
        """Those of the node and of all below."""
        return frozenset({self.source}.union(*(node.all_sources for node in self.below)))

    def guard_count(self, sources: Container[str] | None = None) -> int:
        """Guards of the tree or, given sources, of the part of it that hangs together under them."""
        counted = (node for node in self.below if sources is None or node.source in sources)
        return len(self.leaves) + sum(node.guard_count(sources) for node in counted)

    def mark_ancestors(self, sources: set[str]) -> bool:
        """Add the sources of all nodes that have one with such a source below them."""
        if any([node.mark_ancestors(sources) for node in self.below]):
            sources.add(self.source)
        return self.source in sources

    def has_versions(self) -> bool:
        return self.is_root_with_versions or any(node.has_versions() for node in self.below)


class _Division:
    """Divides the guards of a tree, see Note [what need not be asked again]."""

    def __init__(
        self,
        root: Any,
        values: Values,
        scope: dict[str, Any],
        known: Sequence[str],
        call: str,
        taken: Container[str],
        changes: Changes,
    ) -> None:
        self._root, self._tree, self._graph_arguments, self._changes = root, _Node.read(root), taken, changes
        self._asked = {self._tree.source}
        """Sources of the nodes that are asked in every call."""
        self._class_attributes: set[tuple[type, str]] = set()
        self._compared: set[tuple[Comparison | None, str | int]] = set()
        self._holders: dict[str, Any] = {}
        """Expressions -> dicts, lists and objects of which more is looked at in every call than a version."""
        self._names_of_holders: dict[int, str] = {}
        self.questions: dict[str, set[str]] = {}
        """Expressions whose value must be the same object in every call -> sources of nodes that this answers."""
        self.versions: list[tuple[str, dict[Any, Any], int]] = []
        """Paths of dicts that are compared by version, and their versions."""
        self._tensors: dict[str, torch.Tensor] = {}
        self._own_objects: dict[str, Any] = {}
        self.own = Held()
        self.given: list[tuple[Place, Comparison | None]] = []
        """What to compare how among the arguments; a value that cannot change is only of the same type."""
        self.objects: list[str] = []
        self.taken: list[str] = []
        arguments: list[tuple[_Node, Place]] = []
        for accessor, child in self._tree.children:
            name = _local_name(accessor) or ""
            if name in known:
                self._visit(child, Place(None, "framelocals_manager", name, values[name], is_own=True))
            elif name == call:
                arguments.append((child, Place(None, "framelocals_manager", name, values[name], is_own=False)))
            else:
                self._ask_all(child)
        self.own_tensors, self._tensors = self._tensors, {}
        for child, place in arguments:
            self._visit_arguments(child, place)
        self.given_tensors = self._tensors
        self.same = self._same(values, scope, frozenset().union(*(child.all_sources for child, _ in arguments)))
        self._tree.mark_ancestors(self._asked)

    def others(self) -> Any:
        """Asks what is asked in every call."""
        copy = self._root.clone_manager(lambda node: node.get_source() in self._asked)
        copied = None if copy is None else _Node.read(copy)
        if copied is None or copied.guard_count() != self._tree.guard_count(self._asked):
            raise Unexpected("a copy of Dynamo's guards is not complete")
        # Dynamo passes over a whole branch that it has found to be as before. What it knows of that is about its own
        # tree, in which the branch has other guards.
        return self._root if copied.has_versions() else copy

    def _same(self, values: Values, scope: dict[str, Any], given: Container[str]) -> Same:
        """Asks what only depends on which object lies at a place, or on its class, and need not be asked otherwise."""
        known = {**self._own_objects, **self.own_tensors, **self._holders}
        kinds: dict[str, set[str]] = {}
        for node in self._tree.all_below():
            if node.source in self._asked and node.asks:
                kinds.setdefault(node.source, set()).update(node.asks)
        self._asked &= kinds.keys() | {self._tree.source}
        readable = [source for source in kinds if source not in self._changes.places and is_readable(source)]
        read = reader(readable, scope, known)
        # What is made when it is asked for, such as the names of a function's variables, is never the same.
        there = {
            s: value for s, value, again in zip(readable, read(values), read(values), strict=True) if value is again
        }
        for source, value in there.items():
            if question := _question(source, kinds[source], value, source in given):
                self.questions.setdefault(question, set()).add(source)
                self._asked.discard(source)
        return Same(tuple(self.questions), scope, known, values)

    def _visit_arguments(self, node: _Node, place: Place) -> None:
        """The dict of the arguments is another one in each call; objects in it can be the same."""
        self._asked.add(node.source)
        if node.entries:
            self._ask_all(node)
            return
        for accessor, child in node.children:
            name = _key(accessor)
            value = place.value.get(name) if isinstance(name, str) else None
            if _has_dict(value) and not self._changes.objects:
                self.objects.append(name)
                self._visit(child, place.below("dict_getitem_manager", name, value))
            else:
                self._ask_all(child)

    def _visit(self, node: _Node, place: Place) -> None:
        value = place.value
        if isinstance(value, torch.Tensor):
            if type(value) in _TENSORS and not node.below and all(_is_about_a_tensor(*leaf) for leaf in node.leaves):
                self._tensors[node.source] = value
                if not place.is_own:
                    self._visit_given_tensor(node.source, place)
            else:
                self._ask_all(node)
        elif not all(kind in _LEAVES for kind, _ in node.leaves):
            self._ask_all(node)
        elif _is_unchanging(value):
            self._compare(place, None)
            if node.below:
                self._ask_all(node)
        elif type(value) is dict:
            if self._changes_in_every_call(place):
                self._ask_of_dict(node, place)
            else:  # attributes are compared with the object that has them
                self._compare(place, None if place.is_attributes else compare_version)
                self._remember_version(place)
            self._visit_items(node, place)
        elif type(value) is list:
            self._visit_list(node, place)
        elif _has_dict(value):
            self._visit_object(node, place)
        else:
            self._ask_all(node)

    def _visit_given_tensor(self, source: str, place: Place) -> None:
        if source in self._graph_arguments:
            self._compare(place, compare_taken)
            self.taken.append(source)
        else:
            self._compare(place, compare_tensor)

    def _visit_items(self, node: _Node, place: Place) -> None:
        value = place.value
        keys = list(value)
        items = [(_key(accessor), child) for accessor, child in node.children]
        items += [(keys[at], child) for at, (_, child) in node.entries.items() if child is not None]
        for key, child in items:
            if key is _UNKNOWN or key not in value:
                self._ask_all(child)
            else:
                self._visit_item(child, place.below("dict_getitem_manager", key, value[key]))

    def _visit_item(self, node: _Node, place: Place) -> None:
        """Something that lies in a dict or a list."""
        if self._changes_in_every_call(place.parent) and (
            node.source in self._changes.places or not self._ask_whether_same(node.source, place)
        ):
            self._ask_all(node)
        else:
            self._visit(node, place)

    def _changes_in_every_call(self, place: Place | None) -> bool:
        """Whether nothing that is compared says that the same things lie in a dict or a list of the module."""
        return place is not None and place.is_own and (type(place.value) is list or place.path in self._changes.dicts)

    def _ask_whether_same(self, source: str, place: Place) -> bool:
        """Ask in every call whether the same object lies at the place; False if that cannot be asked."""
        holder, key = place.parent, place.key
        if holder is None or type(key) not in (str, int):
            return False
        self.questions.setdefault(f"{self._holder(holder)}[{key!r}]", set()).add(source)
        return True

    def _holder(self, place: Place) -> str:
        """An expression for a dict or a list whose object, or itself, is the same in every call."""
        held, suffix = (place.parent, ".__dict__") if place.is_attributes and place.parent else (place, "")
        name = self._names_of_holders.setdefault(id(held.value), f"H[{len(self._names_of_holders)}]")
        self._holders[name] = held.value
        return name + suffix

    def _ask_of_dict(self, node: _Node, place: Place) -> None:
        """Ask in every call what is asked of a dict, rather than of what lies in it."""
        settled = frozenset() if place.is_attributes else _BY_IDENTITY | {"TYPE_MATCH"}
        leaves = [(kind, leaf) for kind, leaf in node.leaves if kind not in settled]
        keys = [_contained_key(node.source, leaf) if kind == "DICT_CONTAINS" else None for kind, leaf in leaves]
        if node.is_ordered or None in keys:
            self._asked.add(node.source)
        else:
            for key in keys:
                self.questions.setdefault(f"{key!r} in {self._holder(place)}", set()).add(node.source)
        for key_node, _ in node.entries.values():
            if key_node is not None:
                self._ask_all(key_node)

    def _visit_list(self, node: _Node, place: Place) -> None:
        # Those of an object among the arguments are the same only if each shows it by a dict of its own.
        value = place.value
        children = [(_index(accessor), child) for accessor, child in node.children]
        if any(at is None or not (place.is_own or _has_dict(value[at])) for at, _ in children):
            self._ask_all(node)
            return
        self._compare(place, compare_length)
        for at, child in children:
            assert at is not None
            self._visit_item(child, place.below("list_getitem_manager", at, value[at]))

    def _visit_object(self, node: _Node, place: Place) -> None:
        value = place.value
        attributes = place.below("get_generic_dict_manager", None, value.__dict__)
        if type(attributes.value) is not dict:
            self._ask_all(node)
            return
        is_changing = self._changes_in_every_call(attributes)
        self._compare(place, compare_class if is_changing else compare_object)
        if not is_changing:
            self._remember_version(attributes)
        if place.is_own:
            self._own_objects[node.source] = value
        if is_changing and any(kind != "TYPE_MATCH" and kind not in _BY_IDENTITY for kind, _ in node.leaves):
            self._asked.add(node.source)
        for accessor, child in node.children:
            name = accessor.get_attr_name() if isinstance(accessor, native.GetAttrGuardAccessor) else None
            if isinstance(accessor, native.GetGenericDictGuardAccessor):
                self._visit(child, attributes)
            elif name is None:
                self._ask_all(child)
            elif _lies_in_dict(value, name):
                self._visit_item(child, attributes.below("dict_getitem_manager", name, attributes.value[name]))
            elif is_changing or child.leaves or child.below or (type(value), name) not in self._class_attributes:
                self._class_attributes.add((type(value), name))
                self._ask_all(child)

    def _compare(self, place: Place, how: Comparison | None) -> None:
        this = how, id(place.value) if place.is_own else place.path
        if this in self._compared:
            return
        self._compared.add(this)
        if not place.is_own:
            self.given.append((place, how))
        elif how is not None:
            self.own.append((how, place.value))

    def _remember_version(self, place: Place) -> None:
        if place.is_own:
            self.versions.append((place.path, place.value, native.dict_version(place.value)))

    def _ask_all(self, node: _Node) -> None:
        self._asked |= node.all_sources


_BY_IDENTITY = frozenset({"ID_MATCH", "NONE_MATCH", "TRUE_MATCH", "FALSE_MATCH"})
"""Guards that ask whether an object is a certain one."""


def _question(source: str, kinds: Set[str], value: Any, is_given: bool) -> str:
    """The expression whose value is the same object only while guards of these kinds hold; empty without one."""
    if kinds <= _BY_IDENTITY:
        return source
    if kinds == {"TYPE_MATCH"}:
        return f"type({source})"
    # What comes with a call may well be equal and another object.
    return source if kinds <= _LEAVES and _is_unchanging(value) and (not is_given or kinds & _BY_IDENTITY) else ""


_UNKNOWN = object()


def _local_name(accessor: Any) -> str | None:
    found = re.match(r"FrameLocalsGuardAccessor\(key='(\w+)',", accessor.repr())
    return None if found is None else found[1]


def _key(accessor: Any) -> Any:
    found = re.fullmatch(r"DictGetItemGuardAccessor\('([^'\\]*)'\)", accessor.repr())
    return _UNKNOWN if found is None else found[1]


def _index(accessor: Any) -> int | None:
    found = re.fullmatch(r"ListGetItemGuardAccessor\((\d+)\)", accessor.repr())
    return None if found is None else int(found[1])


def _contained_key(source: str, leaf: Any) -> str | None:
    """Of which key a guard asks whether it is in the dict; None where its words are not known."""
    (text,) = leaf.verbose_code_parts() or ("",)
    found = re.match(r"(?:not )?___dict_contains\('([^'\\]*)', " + re.escape(source) + r"\)(?:\s|$)", text)
    return None if found is None else found[1]


def _is_about_a_tensor(kind: str, leaf: Any) -> bool:
    if kind in ("NO_HASATTR", "DYNAMIC_INDICES"):
        return all("_dynamo_" in text for text in leaf.verbose_code_parts())
    return kind in _LEAVES_OF_TENSORS


def _is_unchanging(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_unchanging, value))
    return type(value) in _UNCHANGING or type(value) is FunctionType


def _has_dict(value: Any) -> bool:
    return not isinstance(value, (torch.Tensor, type, FunctionType)) and hasattr(value, "__dict__")


def _lies_in_dict(value: Any, name: str) -> bool:
    """Whether the attribute is what the object's dict has under this name, whatever its class has."""
    cls = type(value)
    if cls.__getattribute__ is not object.__getattribute__ or name not in value.__dict__:
        return False
    of_class = next((base.__dict__[name] for base in cls.__mro__ if name in base.__dict__), None)
    return not hasattr(type(of_class), "__set__") and not hasattr(type(of_class), "__delete__")
