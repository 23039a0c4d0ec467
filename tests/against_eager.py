"""Calls a function eagerly and compiled, on equal arguments, and compares everything that a caller can see."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import pp_piecewise_backend as ppb


def check(
    function: Callable[..., Any],
    *calls: Sequence[Any],
    split_ops: str | None = None,
    compiler: str = "eager",
    dynamic: bool | None = None,
    mark: bool = True,
    tolerance: float = 0.0,
    unsplit: bool = False,
    twin: Callable[..., Any] | None = None,
    exact_strides: bool = True,
    **options: Any,
) -> Any:
    """Compare ``function`` compiled by the backend with itself run eagerly; the last program comes back.

    Args:
        calls: positional arguments of one call each. Tensors among them are copied, with their aliasing.
        mark: whether to mark, in the first call, dimension 0 as dynamic in all tensors that have it in common with
            the first one. Sizes above 1 are then one program.
        unsplit: whether the graph is expected to be given to the stock backend whole.
        twin: what to run eagerly; a deep copy of ``function`` when that is a module, else ``function``.
    """
    torch._dynamo.reset()
    ppb.reset()
    options = {"compiler": compiler, **options, **({} if split_ops is None else {"split_ops": split_ops})}
    if twin is None:
        twin = copy.deepcopy(function) if isinstance(function, torch.nn.Module) else function
    compiled = torch.compile(function, backend="pp_piecewise", options=options, dynamic=dynamic, fullgraph=True)
    for index, arguments in enumerate(calls):
        ours, theirs = copy.deepcopy(list(arguments)), copy.deepcopy(list(arguments))
        if index == 0 and mark:
            mark_tokens(ours)
        state = torch.get_rng_state()
        expected = twin(*theirs)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        got = compiled(*ours)
        if compiler == "eager":
            assert torch.equal(torch.get_rng_state(), after), "the random generator was advanced otherwise"
        assert_same(got, expected, tolerance, exact_strides)
        assert_same(ours, theirs, tolerance, exact_strides)
        assert aliasing(ours, got) == aliasing(theirs, expected), f"aliasing in call {index}"
        if isinstance(function, torch.nn.Module):
            assert isinstance(twin, torch.nn.Module)
            assert_same(function.state_dict(), twin.state_dict(), tolerance, exact_strides)
    programs = ppb.programs()
    assert sum(program.stats.calls for program in programs) == len(calls), "a call did not reach a program"
    assert all((not program.pieces) == unsplit for program in programs), ppb.explain()
    for program in programs:
        kinds = [piece.kind for piece in program.pieces]
        assert ("compute", "compute") not in pairwise(kinds), "two pieces that could be one, and one graph"
    return programs[-1]


def mark_tokens(arguments: Any) -> None:
    """Mark dimension 0 as dynamic in the first tensor and in all that have as many rows."""
    leaves = [leaf for leaf in tensors(arguments) if leaf.dim()]
    for leaf in leaves:
        if leaf.shape[0] == leaves[0].shape[0] > 1:
            torch._dynamo.mark_dynamic(leaf, 0)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def aliasing(arguments: Any, results: Any) -> list[tuple[int, int, bool]]:
    """For each tensor of both trees: the first one of the same storage, the first same object, whether inference."""
    leaves = [leaf for leaf in tensors([arguments, results]) if leaf.numel()]
    storages = [leaf.untyped_storage().data_ptr() for leaf in leaves]
    objects = [id(leaf) for leaf in leaves]
    return [
        (storages.index(storage), objects.index(identity), leaf.is_inference())
        for storage, identity, leaf in zip(storages, objects, leaves, strict=True)
    ]


def assert_same(got: Any, expected: Any, tolerance: float = 0.0, exact_strides: bool = True) -> None:
    """Equal structure, types, numbers and tensors: values, dtype, shape, strides, offset, gradients."""
    got_leaves, got_spec = pytree.tree_flatten(got)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert got_spec == expected_spec
    for one, other in zip(got_leaves, expected_leaves, strict=True):
        assert type(one) is type(other)
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
            assert one.requires_grad == other.requires_grad
            if exact_strides:
                assert (one.stride(), one.storage_offset()) == (other.stride(), other.storage_offset())
        else:
            assert one == other or one is other


def kinds(program: Any) -> list[str]:
    return [piece.kind for piece in program.pieces]


def eager_ops(program: Any) -> list[str]:
    return [op for piece in program.pieces if piece.kind == "eager" for op in piece.ops]


def compute_ops(program: Any) -> list[str]:
    return [op for piece in program.pieces if piece.kind == "compute" for op in piece.ops]


def steps(program: Any) -> str:
    """The kinds of the steps in order, by their initials, such as "cec"."""
    return "".join(kind[0] for kind in kinds(program))


def tokens(*sizes: int, width: int = 8) -> list[tuple[Tensor]]:
    """One call for each size, with a float tensor of so many rows."""
    return [(torch.randn(size, width),) for size in sizes]
