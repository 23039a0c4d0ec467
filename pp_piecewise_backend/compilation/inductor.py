"""From a piece to a callable, once per distinct piece: the only door to ``torch._inductor``.

Note [private shapes]
Compilers add guards to the shape environment under which they trace: ``s <= 4096`` for a softmax, ``Eq(s, 10)`` for a
pooling [ran]. In Dynamo's environment these would break the user's ``mark_dynamic`` or cost a recompile. Each piece
is therefore compiled in an environment of its own, and what the compiler came to rely on is kept as data: where it
does not hold, the piece runs as plain FX.
"""

from __future__ import annotations

import copy
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch

from ..config import Config
from ..utils import torch_compat
from .specs import Dim, SymbolSpec, TensorSpec, evaluate
from .split import Piece

_OWN_GRAPHS_OFF = {"triton.cudagraphs": False, "triton.cudagraph_trees": False}


@dataclass(frozen=True)
class CompiledPiece:
    """A compute piece as a callable, shared by all pieces with the same key. Owns no tensor memory."""

    key: tuple[object, ...]
    call: Callable[..., Sequence[Any]] = field(repr=False)
    """Takes the piece's inputs in order (tensors and ints), returns its outputs in order."""
    conditions: tuple[sympy.Basic, ...]
    """What must hold for its symbols (in the order of the piece's symbol inputs, named ``s0``, ``s1``, ...)."""
    compile_seconds: float
    failure: str | None = None
    """Why the compiler gave up, if it did; ``call`` is then the plain FX graph."""

    @cached_property
    def accepts(self) -> Callable[[Sequence[int]], bool]:
        """Whether the compiled code may run for these values of the piece's symbols.

        The conditions as Python: each un-captured run asks, and sympy would take a hundred times as long.
        """
        symbols = {symbol for condition in self.conditions for symbol in condition.free_symbols}
        sizes = {symbol: sympy.Symbol(f"sizes[{symbol.name.removeprefix('s')}]") for symbol in symbols}
        texts = [f"({torch_compat.expression_text(condition.xreplace(sizes))})" for condition in self.conditions]
        accepts: Callable[[Sequence[int]], bool] = eval(f"lambda sizes: {' and '.join(texts) or True}", {"math": math})
        return accepts


class PieceCompiler:
    """Compiles pieces and remembers them by meaning. Threads may share it."""

    def __init__(self, share: bool = True) -> None:
        """``share=False`` compiles every piece again, for comparison."""
        self._share = share
        self._compiled: dict[tuple[object, ...], CompiledPiece] = {}
        self._in_progress: dict[tuple[object, ...], threading.Lock] = {}
        self._lock = threading.Lock()

    def compile(self, piece: Piece, config: Config) -> tuple[CompiledPiece, bool]:
        """The callable for a compute piece, and whether an earlier equal piece already had it."""
        key = (piece.key, *config.cache_key(), *ambient_state())
        with self._lock:
            turn = self._in_progress.setdefault(key, threading.Lock())
        with turn:
            if self._share and (known := self._compiled.get(key)) is not None:
                return known, True
            compiled = _compile(piece, key, config.compiler)
            if self._share:
                self._compiled[key] = compiled
            return compiled, False

    def reset(self) -> None:
        """Forget all compiled pieces; programs keep theirs."""
        with self._lock:
            self._compiled.clear()
            self._in_progress.clear()


def generated_files() -> tuple[str, ...]:
    """Paths of the Python files that Inductor generated and loaded in this process, oldest first."""
    codecache = sys.modules.get("torch._inductor.codecache")
    return () if codecache is None else tuple(module.__file__ for module in codecache.PyCodeCache.modules)


def ambient_state() -> tuple[object, ...]:
    """Everything around a compilation that changes what the compiled code computes."""
    import torch._inductor.config as inductor_config

    return (
        torch.__version__,
        inductor_config.get_hash(),
        torch.get_default_dtype(),
        str(torch.get_default_device()),
        torch_compat.autocast_state(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cudnn.allow_tf32,
        torch.get_num_threads(),
    )


def _compile(piece: Piece, key: tuple[object, ...], compiler: str) -> CompiledPiece:
    started = time.perf_counter()
    call: Callable[..., Any] = piece.graph_module.forward
    conditions: tuple[sympy.Basic, ...] = ()
    failure = None
    if compiler != "eager":
        try:
            call, conditions = _compiled(piece, compiler)
        except Exception as error:
            failure = f"{compiler} could not compile this piece: {type(error).__name__}: {error}"
    return CompiledPiece(key, call, conditions, time.perf_counter() - started, failure)


def _compiled(piece: Piece, compiler: str) -> tuple[Callable[..., Any], tuple[sympy.Basic, ...]]:
    """What the compiler made of a piece, and the conditions under which it holds."""
    shapes = _PrivateShapes(piece.input_specs)
    settings = {"config_patches": dict(_OWN_GRAPHS_OFF)} if compiler == "inductor" else {}
    with torch.inference_mode(False), torch.no_grad(), torch_compat.private_tracing(shapes.fake_mode):
        graph_module = copy.deepcopy(piece.graph_module)
        call = torch_compat.stock_backend(compiler)(graph_module, shapes.inputs, **settings)
    return call, shapes.conditions()


class _PrivateShapes:
    """Fake inputs for one piece in a shape environment of its own; see Note [private shapes]."""

    def __init__(self, specs: Sequence[TensorSpec | SymbolSpec | None]) -> None:
        self._env = torch_compat.new_shape_env()
        self.fake_mode = torch_compat.FakeTensorMode(shape_env=self._env)
        self._given = [spec for spec in specs if isinstance(spec, SymbolSpec)]
        symints = {
            spec.symbol: torch_compat.new_symbol(self._env, f"s{index}", spec.hint, spec.lower, spec.upper)
            for index, spec in enumerate(self._given)
        }
        self._hints = {spec.symbol: spec.hint for spec in self._given if spec.hint is not None}
        self._private = {symbol: torch_compat.symint_expression(symint) for symbol, symint in symints.items()}
        with self.fake_mode:
            self.inputs: list[Any] = [
                symints[spec.symbol] if isinstance(spec, SymbolSpec) else self._tensor(spec)
                for spec in specs
                if spec is not None
            ]

    def _tensor(self, spec: TensorSpec) -> torch.Tensor:
        shape = [self._integer(dim) for dim in spec.shape]
        stride = [self._integer(dim) for dim in spec.stride]
        return torch.empty_strided(shape, stride, dtype=spec.dtype, device=spec.device)

    def _integer(self, dim: Dim) -> int | torch.SymInt:
        if isinstance(dim, int):
            return dim
        hint = evaluate(dim, self._hints) if dim.free_symbols <= self._hints.keys() else None
        return torch_compat.symint_from_expression(self._env, dim.xreplace(self._private), hint)

    def conditions(self) -> tuple[sympy.Basic, ...]:
        """What the compiler relied on beyond the ranges that it was given."""
        found = list(torch_compat.shape_env_conditions(self._env))
        ranges = torch_compat.shape_env_ranges(self._env)
        canonical = {}
        for index, spec in enumerate(self._given):
            symbol = self._private[spec.symbol]
            canonical[symbol] = sympy.Symbol(f"s{index}")
            lower, upper = ranges[symbol]
            if lower is not None and (spec.lower is None or lower > spec.lower):
                found.append(sympy.Ge(symbol, lower, evaluate=False))
            if upper is not None and (spec.upper is None or upper < spec.upper):
                found.append(sympy.Le(symbol, upper, evaluate=False))
        renamed = dict.fromkeys(condition.xreplace(canonical) for condition in found)
        return tuple(condition for condition in renamed if condition != sympy.true)
