"""A piece that adds one, as an example. Every piece's script is this file with its own lines between the two marks.

    python FILE                      run it eagerly and through Inductor, compare, time
    python FILE s0=16                with other sizes
    python FILE --import MODULE      after importing what registers its custom ops
    python FILE --backend aot_eager  with another backend of torch.compile

Exit code 0: equal, or it says why it cannot run here. 1: different, or it could not be compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import operator
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# --------------------------------------------------------------------------------------- this piece

PIECE = "an example"
FUNCTIONS: dict[str, tuple[str, str]] = {}  # name below: module and path within it
MODULES: tuple[str, ...] = ()  # of torch, that hold functions used below
CUSTOM_OPS: tuple[str, ...] = ()  # must be registered: --import the module that does it
MISSING: list[str] = []  # what is used below and cannot be imported from anywhere
DEVICES: tuple[str, ...] = ("cpu",)
SIZES = {"s0": 3}  # of the traced call; give others as s0=16
DYNAMIC_DIMS = (("x", 0),)
UNINITIALISED: tuple[int, ...] = ()  # outputs that hold garbage by contract


class Piece(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + 1,)


def make_inputs(tensor: Callable[..., Recorded], s0: int) -> dict[str, Recorded]:
    return {"x": tensor((s0, 4), (4, 1), 0, torch.float32, "cpu", memory=0)}


def call(piece: Any, t: dict[str, torch.Tensor], sizes: dict[str, int]) -> tuple[Any, ...]:
    return piece(t["x"])


# ------------------------------------------------------------ the same in every piece's script

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # others: 0.1

Tensors = dict[str, torch.Tensor]
Function = Callable[[Any, Tensors, dict[str, int]], Any]


class Recorded(NamedTuple):
    """A tensor of the traced call. Equal numbers of ``memory`` share it; ``integers``: its smallest and largest."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: str
    memory: int
    integers: tuple[int, int] = (0, 0)


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
        for name, (module, path) in FUNCTIONS.items():
            found: Any = importlib.import_module(module)
            globals()[name] = operator.attrgetter(path)(found) if path else found
    except (ImportError, AttributeError) as error:
        return f"{error}; give the folder of that module in PYTHONPATH, or a module that provides it as --import MODULE"
    return None


def build(sizes: dict[str, int]) -> Tensors:
    """Name -> tensor, with the recorded geometry; tensors with equal memory share it."""
    recorded = make_inputs(Recorded, **sizes)
    first: dict[int, Recorded] = {}
    length_bytes: dict[int, int] = {}
    for r in recorded.values():
        first.setdefault(r.memory, r)
        seen = torch.empty_strided(r.shape, r.stride, dtype=r.dtype, device="meta").untyped_storage().nbytes()
        length_bytes[r.memory] = max(length_bytes.get(r.memory, 0), seen + r.offset * r.dtype.itemsize)
    generator = torch.Generator().manual_seed(0)
    storages = {
        memory: values(r, -(-length_bytes[memory] // r.dtype.itemsize), generator).to(r.device).untyped_storage()
        for memory, r in first.items()
    }
    return {
        name: torch.empty(0, dtype=r.dtype, device=r.device).set_(storages[r.memory], r.offset, r.shape, r.stride)
        for name, r in recorded.items()
    }


def values(recorded: Recorded, length: int, generator: torch.Generator) -> torch.Tensor:
    dtype, shape = recorded.dtype, recorded.shape
    if dtype == torch.bool:
        return torch.rand(length, generator=generator) < 0.5
    if dtype.is_floating_point or dtype.is_complex:
        made = torch.randn(length, generator=generator, dtype=torch.complex64 if dtype.is_complex else torch.float32)
        if len(shape) > 1:
            made *= max(shape[-1], 1) ** -0.5  # as weights are, so that products stay of one size
        return (made if shape else made.abs() + 0.1).to(dtype)
    low, high = recorded.integers
    return torch.randint(low, high + 1, (length,), generator=generator, dtype=torch.int64).to(dtype)


def run(function: Function, piece: Piece, tensors: Tensors, sizes: dict[str, int], seed: int = 0) -> dict[str, Any]:
    """What the caller can see afterwards: the outputs, and the inputs, which may have been written."""
    tensors = copy.deepcopy(tensors)  # what shares memory still does
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
        elif (right.shape, right.dtype) != (value.shape, value.dtype):
            lines.append(f"{name}: eager {right.dtype}{list(right.shape)}, compiled {value.dtype}{list(value.shape)}")
        elif not (right.dtype.is_floating_point or right.dtype.is_complex):
            if wrong := (right != value).sum().item():
                lines.append(f"{name}: {wrong} of {right.numel()} elements differ")
        elif right.numel():
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


def microseconds(function: Function, piece: Piece, tensors: Tensors, sizes: dict[str, int]) -> str:
    """Median time of a call and, since other work on the machine makes that longer, the shortest."""
    tensors = copy.deepcopy(tensors)

    def once() -> None:
        function(piece, tensors, sizes)
        if "cuda" in DEVICES:
            torch.cuda.synchronize()

    times = max(5, min(200, int(0.3 / timeit.timeit(once, number=1))))
    seconds = timeit.repeat(once, number=1, repeat=times)
    return f"{1e6 * statistics.median(seconds):.1f} us (fastest {1e6 * min(seconds):.1f})"


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
        if any(differences(eager, run(call, piece, tensors, sizes, seed=1))):
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
            f"{PIECE}: equal: outputs {outputs}, inputs afterwards {len(tensors)}, uninitialised and left out "
            f"{len(UNINITIALISED)}; largest relative difference {largest:.2g}"
        )
        print(
            f"  eager {microseconds(call, piece, tensors, sizes)}, {options.backend} "
            f"{microseconds(function, piece, tensors, sizes)}, compiled in {compile_seconds:.2f} s; "
            f"sizes {sizes}; torch {torch.__version__}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
