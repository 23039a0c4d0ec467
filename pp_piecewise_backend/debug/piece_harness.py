"""The script of a piece that adds one. Every piece's script is this file, with what is above the line written for it.

    python FILE                      run it eagerly and through Inductor, compare, time
    python FILE s0=16                with other sizes
    python FILE --import MODULE      after importing what registers its custom ops
    python FILE --backend aot_eager  with another backend of torch.compile

Exit code 0: equal, or it says why it cannot run here. 1: different, or it could not be compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

PIECE = "an example"
CUSTOM_OPS: tuple[str, ...] = ()  # must be registered: --import the module that does it
MODULES: tuple[str, ...] = ()  # of torch, that hold functions used below
DEVICES: tuple[str, ...] = ("cpu",)
MISSING: list[str] = []  # what is used below and cannot be imported from anywhere
SIZES = {"s0": 3}  # of the traced call; give others as s0=16
UNINITIALISED: tuple[int, ...] = ()  # outputs that hold garbage by contract


def import_functions() -> None:
    return None


class Piece(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + 1,)


def make_inputs(tensor: Callable[..., Any], s0: int) -> dict[str, Any]:
    """Name: tensor(shape, stride, offset, dtype, device, memory, integers). Equal memory is shared."""
    return {"x": tensor((s0, 4), (4, 1), 0, torch.float32, "cpu", memory=0)}


def call(piece: Any, t: dict[str, torch.Tensor], sizes: dict[str, int]) -> tuple[Any, ...]:
    return piece(t["x"])


DYNAMIC_DIMS = (("x", 0),)


# ------------------------------------------------------------ the same in every piece's script


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # others: 0.1

Tensors = dict[str, torch.Tensor]
Function = Callable[[Any, Tensors, dict[str, int]], Any]


def look_up(module: str, path: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in filter(None, path.split(".")):
        found = getattr(found, part)
    return found


def why_not() -> str | None:
    """Why the piece cannot run here; None if it can."""
    if MISSING:
        return f"it uses {', '.join(MISSING)}, which cannot be imported from anywhere"
    for name in DEVICES:
        if name != "cpu" and not getattr(torch, name).is_available():
            return f"it needs the device {name!r}, and torch sees none"
    for name in CUSTOM_OPS:
        namespace, _, op = name.partition("::")
        if not hasattr(getattr(torch.ops, namespace), op):
            return f"the custom op {name} is not registered; give the module that registers it as --import MODULE"
    for name in MODULES:
        with contextlib.suppress(ImportError):  # its functions are reached in another way, or the run says so
            importlib.import_module(name)
    try:
        import_functions()
    except (ImportError, AttributeError) as error:
        return f"{error}; give the folder of that module in PYTHONPATH, or a module that provides it as --import MODULE"
    return None


def build(sizes: dict[str, int]) -> Tensors:
    """Name -> tensor, with the recorded geometry; tensors with equal memory share it."""
    recorded = make_inputs(lambda *args, **kwargs: (args, kwargs), **sizes)
    length_bytes: dict[int, int] = {}
    first: dict[int, Any] = {}
    for (shape, stride, offset, dtype, where), more in recorded.values():
        memory = more["memory"]
        empty = 0 in shape
        extent = 0 if empty else offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        length_bytes[memory] = max(length_bytes.get(memory, 0), extent * dtype.itemsize)
        first.setdefault(memory, (dtype, shape, where, more.get("integers")))
    generator = torch.Generator().manual_seed(0)
    storages: dict[int, Any] = {}
    for memory, (dtype, shape, where, integers) in first.items():
        length = -(-length_bytes[memory] // dtype.itemsize)
        storages[memory] = values(length, dtype, shape, integers, generator).to(where).untyped_storage()
    return {
        name: torch.empty(0, dtype=dtype, device=where).set_(storages[more["memory"]], offset, shape, stride)
        for name, ((shape, stride, offset, dtype, where), more) in recorded.items()
    }


def values(
    length: int, dtype: torch.dtype, shape: Any, integers: tuple[int, int] | None, generator: torch.Generator
) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(length, generator=generator) < 0.5
    if dtype.is_floating_point or dtype.is_complex:
        made = torch.randn(length, generator=generator, dtype=torch.complex64 if dtype.is_complex else torch.float32)
        if len(shape) > 1:
            made *= max(shape[-1], 1) ** -0.5  # as weights are, so that products stay of one size
        return (made if shape else made.abs() + 0.1).to(dtype)
    low, high = integers or (0, 0)
    return torch.randint(low, high + 1, (length,), generator=generator, dtype=torch.int64).to(dtype)


def clone(tensors: Tensors) -> Tensors:
    """Fresh tensors that share memory among themselves as the given ones do."""
    storages: dict[int, Any] = {}
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage.clone())
    return {
        name: torch.empty(0, dtype=t.dtype, device=t.device).set_(
            storages[t.untyped_storage().data_ptr()], t.storage_offset(), t.shape, t.stride()
        )
        for name, t in tensors.items()
    }


def run(function: Function, piece: Piece, tensors: Tensors, sizes: dict[str, int], seed: int = 0) -> dict[str, Any]:
    """What the caller can see afterwards: the outputs, and the inputs, which may have been written."""
    tensors = clone(tensors)
    for name, dim in DYNAMIC_DIMS:
        torch._dynamo.maybe_mark_dynamic(tensors[name], dim)
    torch.manual_seed(seed)
    outputs = function(piece, tensors, sizes)
    seen = {f"output {i}": value for i, value in enumerate(outputs) if i not in UNINITIALISED}
    return {**seen, **{f"input {name}": tensor for name, tensor in tensors.items()}}


def differences(wanted: dict[str, Any], got: dict[str, Any]) -> tuple[list[str], float]:
    """One line for each value that differs, and the largest relative difference of those that do not."""
    lines: list[str] = []
    largest = 0.0
    for name, right in wanted.items():
        value = got[name]
        if not isinstance(right, torch.Tensor):
            if right != value:
                lines.append(f"{name}: eager {right!r}, compiled {value!r}")
            continue
        if (right.shape, right.dtype) != (value.shape, value.dtype):
            lines.append(f"{name}: eager {right.dtype}{list(right.shape)}, compiled {value.dtype}{list(value.shape)}")
            continue
        if not right.numel():
            continue
        if not (right.dtype.is_floating_point or right.dtype.is_complex):
            wrong = (right != value).sum().item()
            lines += [f"{name}: {wrong} of {right.numel()} elements differ"] if wrong else []
            continue
        wide = torch.complex128 if right.dtype.is_complex else torch.float64
        a, b = right.to(wide), value.to(wide)
        same = (a == b) | (a.isnan() & b.isnan())
        scale = 1 + torch.where(a.abs().isfinite(), a.abs(), 0.0).max().item()
        relative = torch.where(same, 0.0, (a - b).abs() / scale).nan_to_num(nan=float("inf")).max().item()
        if relative > TOLERANCE.get(right.dtype, 0.1):
            lines.append(f"{name}: largest difference {relative:.3g} of {scale:.3g}")
        else:
            largest = max(largest, relative)
    return lines, largest


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        if isinstance(a, torch.Tensor) and not a.is_complex()
        else isinstance(a, torch.Tensor) or a == b
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def microseconds(function: Function, piece: Piece, tensors: Tensors, sizes: dict[str, int]) -> float:
    """Median time of a call."""
    synchronize = torch.cuda.synchronize if "cuda" in DEVICES else lambda: None
    tensors, stop = clone(tensors), time.perf_counter() + 0.3
    taken: list[float] = []
    while len(taken) < 5 or (time.perf_counter() < stop and len(taken) < 200):
        synchronize()
        begin = time.perf_counter()
        function(piece, tensors, sizes)
        synchronize()
        taken.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(taken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", metavar="s0=16", help=f"recorded: {SIZES}")
    parser.add_argument("--import", dest="modules", action="append", default=[], metavar="MODULE")
    parser.add_argument("--backend", default="inductor")
    options = parser.parse_args()
    for name in options.modules:
        importlib.import_module(name)
    sizes = dict(SIZES)
    for text in options.sizes:
        name, _, size = text.partition("=")
        if name not in SIZES or not size.isdigit():
            parser.error(f"got {text!r}, expected NAME=NUMBER with one of the names {', '.join(SIZES) or '(none)'}")
        sizes[name] = int(size)
    reason = why_not()
    if reason is not None:
        print(f"{PIECE}: cannot run here: {reason}")
        return 0
    with torch.no_grad():
        piece, tensors = Piece(), build(sizes)
        try:
            eager = run(call, piece, tensors, sizes)
        except Exception as error:
            print(f"{PIECE}: cannot run here: even eagerly: {type(error).__name__}: {error}")
            return 0
        if not equal(eager, run(call, piece, tensors, sizes, seed=1)):
            print(f"{PIECE}: cannot be compared: it draws random numbers, or reads memory that nothing has written")
            return 0
        function = torch.compile(call, backend=options.backend)
        begin = time.perf_counter()
        try:
            compiled = run(function, piece, tensors, sizes)
        except Exception as error:
            print(f"{PIECE}: {options.backend} failed: {type(error).__name__}: {error}")
            return 1
        compile_seconds = time.perf_counter() - begin
        lines, largest = differences(eager, compiled)
        if lines:
            print(f"{PIECE}: DIFFERENT, eager against {options.backend}:")
            print("\n".join(f"  {line}" for line in lines))
            return 1
        outputs = sum(name.startswith("output") for name in eager)
        print(
            f"{PIECE}: equal: {outputs} outputs and {len(tensors)} inputs afterwards, {len(UNINITIALISED)} "
            f"uninitialised outputs left out; largest relative difference {largest:.2g}"
        )
        print(
            f"  eager {microseconds(call, piece, tensors, sizes):.1f} us, {options.backend} "
            f"{microseconds(function, piece, tensors, sizes):.1f} us, compiled in {compile_seconds:.2f} s; "
            f"sizes {sizes}; torch {torch.__version__}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
