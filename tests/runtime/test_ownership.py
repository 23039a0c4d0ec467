"""What the caller gets: copies of what later calls overwrite, sharing memory exactly where eager's results do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pp_piecewise_backend.compilation.placeholders import GraphInput
from pp_piecewise_backend.compilation.specs import TensorSpec
from pp_piecewise_backend.runtime.cudagraphs.memory import address
from pp_piecewise_backend.runtime.ownership import (
    hand_over,
    merged_results,
    results_in,
    shares_undeclared,
    undeclared_sharing,
)
from pp_piecewise_backend.utils.addresses import MemoryMap, span


def graph_input(tensor: Tensor, storage: int) -> GraphInput:
    return GraphInput("x", "L['x']", "x", "other", "", TensorSpec.of(tensor, storage))


def handed(results: list[Any], storages: list[int | None], static: Tensor, inputs: set[int] | None = None) -> int:
    return hand_over(results, results_in(MemoryMap.of([static]), results, storages, inputs or set()))


def split(result_storages: list[int | None], compiled: set[int]) -> Any:
    x = torch.randn(1)
    piece = SimpleNamespace(kind="compute", output_specs=[TensorSpec.of(x, storage) for storage in compiled])
    step = SimpleNamespace(kind="eager", output_specs=[None, TensorSpec.of(x, 2)])
    return SimpleNamespace(result_storages=result_storages, pieces=[piece, step])


@pytest.mark.parametrize(
    "view",
    [
        lambda block: block.view(4, 6),
        lambda block: block[:12].view(3, 4),
        lambda block: block.view(4, 6).t(),
        lambda block: block.view(4, 6)[:, 1:5:2],
        lambda block: block[3:9],
        lambda block: block[5:6].expand(3),
        lambda block: block[2:6, None].expand(4, 3),
        lambda block: block[7],
        lambda block: block[:0],
    ],
    ids=["whole", "rows", "transposed", "strided", "offset", "expanded", "expanded-columns", "scalar", "empty"],
)
def test_a_copy_has_the_geometry_and_its_own_memory(view: Any) -> None:
    block = torch.arange(24.0)
    static = view(block)
    results = [static]
    assert handed(results, [1], block) == 1
    (copied,) = results
    assert copied is not static and torch.equal(copied, static)
    assert (copied.shape, copied.stride()) == (static.shape, static.stride())
    assert copied.storage_offset() == static.storage_offset()
    before = copied.clone()
    block.zero_()
    assert torch.equal(copied, before)


def test_results_that_share_memory_in_eager_share_their_copy() -> None:
    block = torch.arange(24.0)
    whole, part, turned = block.view(4, 6), block.view(4, 6)[1:3], block.view(4, 6).t()
    results = [whole, part, turned]
    assert handed(results, [1, 1, 1], block) == 3
    assert len({address(result) for result in results}) == 1 and address(results[0]) != address(block)
    for result, original in zip(results, (whole, part, turned), strict=True):
        assert torch.equal(result, original) and result.stride() == original.stride()
        assert result.storage_offset() == original.storage_offset()
    results[1].zero_()
    assert results[0][1:3].eq(0).all() and block.view(4, 6)[1:3].sum() != 0


def test_results_that_do_not_share_in_eager_are_separated() -> None:
    block = torch.arange(24.0)
    results = [block[:12], block[:12]]  # memory that served one value after the other, or that a compiler merged
    assert handed(results, [1, 2], block) == 2
    assert address(results[0]) != address(results[1])


def test_results_of_other_dtypes_in_one_memory() -> None:
    block = torch.arange(24.0)
    results: list[Any] = [block, block.view(torch.int32)[4:]]
    originals = [result.clone() for result in results]
    assert handed(results, [1, 1], block) == 2
    block.zero_()
    assert all(torch.equal(one, other) for one, other in zip(results, originals, strict=True))


def test_what_is_not_ours_to_copy() -> None:
    block, other = torch.arange(24.0), torch.arange(3.0)
    view_of_input = block[4:8]
    results = [other, view_of_input, 7, None]
    assert handed(results, [1, 2, None, None], block, inputs={2}) == 0
    assert results[0] is other and results[1] is view_of_input and results[2:] == [7, None]


def test_copies_belong_to_the_mode_of_the_caller() -> None:
    block = torch.arange(24.0)
    results = [block[:4]]
    with torch.inference_mode():
        handed(results, [1], block)
    assert results[0].is_inference()


# --------------------------------------------------------------------------------- merging


def test_results_that_a_compiler_merged_are_found() -> None:
    x, y = torch.randn(3), torch.randn(3)
    inputs, args = [graph_input(x, 0), graph_input(y, 1)], [x, y]
    own = torch.randn(4)
    assert merged_results(inputs, args, [x, y[1:], own], split([0, 1, 2], {2})) == ()
    assert merged_results(inputs, args, [x, y, own], split([2, 1, 3], {2, 3})) == (0,)
    assert merged_results(inputs, args, [x, y, own], split([2, 1, 3], {3})) == ()  # an eager step does as eager does
    assert merged_results(inputs, args, [own, own[1:], own[2:]], split([2, 2, 3], {2, 3})) == (2,)
    assert merged_results(inputs, args, [own, own], split([2, 3], {2, 3})) == (1,)


def test_what_has_no_memory_is_not_merged() -> None:
    x = torch.randn(0)
    assert (
        merged_results([graph_input(x, 0)], [x], [x, 3, None, torch.empty(0)], split([1, None, None, 2], {1, 2})) == ()
    )


def test_what_two_inputs_declare_of_one_memory_is_believed_of_both() -> None:
    x = torch.randn(3)  # passed as two arguments, which no guard of Dynamo's forbids
    inputs = [graph_input(x, 0), graph_input(x, 1)]
    assert merged_results(inputs, [x, x], [x[1:], x[1:], x], split([1, 0, 2], {2})) == (2,)


def test_sharing_is_declared_by_any_storage_at_the_address() -> None:
    array = torch.randn(8).numpy()
    x, middle, after = (torch.from_numpy(part) for part in (array[:4], array[2:6], array[4:]))
    declared = MemoryMap([(span(x), 4), (span(x), 5), (span(torch.empty(0)), 7)])
    assert not shares_undeclared(x[1:], 5, declared) and not shares_undeclared(middle, 5, declared)
    assert shares_undeclared(x, 6, declared) and shares_undeclared(x, None, declared)
    assert shares_undeclared(middle, 6, declared)  # in a storage of its own, over half of the memory
    for other in (x.clone(), after, x[:0], torch.empty(0), 3):
        assert not shares_undeclared(other, 6, declared)


def test_sharing_among_values_is_found_at_the_later_one() -> None:
    x, y = torch.randn(3), torch.randn(3)
    assert undeclared_sharing([(x, 1), (y, 2), (x[1:], 1), (x, 3), (x, 3), (y, 1)]) == (3, 4, 5)
    assert undeclared_sharing([(x, 1), (y, 2)], given=[(y, 3), (x, 1)]) == (1,)
