"""From a piece to a callable, once per distinct piece: the only door to ``torch._inductor``.

Note [sums beside a product]
Inductor turns ``x @ w + residual`` into one ``addmm``, for which PyTorch first copies the residual to where the result
goes. In a decoder a norm reads the sum, and its kernel can make it without that copy. So where the addend has the shape
of the product, and is no bias, both are taken apart again. It also rounds as eager code does, the product before the
sum.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import sympy
import torch

from ..config import Config
from ..utils import torch_compat
from .specs import FakeInputs, TensorSpec
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

    def __init__(self) -> None:
        self._compiled: dict[tuple[object, ...], CompiledPiece] = {}
        self._in_progress: dict[tuple[object, ...], threading.Lock] = {}
        self._lock = threading.Lock()

    def compile(self, piece: Piece, config: Config) -> tuple[CompiledPiece, bool]:
        """The callable for a compute piece, and whether an earlier equal piece already had it."""
        key = (piece.key, *config.cache_key(), *ambient_state())
        with self._lock:
            turn = self._in_progress.setdefault(key, threading.Lock())
        with turn:
            if (known := self._compiled.get(key)) is not None:
                return known, True
            compiled = self._compiled[key] = _compile(piece, key, config.compiler)
            return compiled, False

    def reset(self) -> None:
        """Forget all compiled pieces; programs keep theirs."""
        with self._lock:
            self._compiled.clear()
            self._in_progress.clear()


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
    shapes = FakeInputs(piece.input_specs)
    settings = {"config_patches": _patches(piece)} if compiler == "inductor" else {}
    with torch.inference_mode(False), torch.no_grad(), torch_compat.private_tracing(shapes.fake_mode):
        graph_module = copy.deepcopy(piece.graph_module)
        call = torch_compat.stock_backend(compiler)(graph_module, shapes.inputs, **settings)
    return call, shapes.conditions()


def _patches(piece: Piece) -> dict[str, Any]:
    """Settings of Inductor for the piece, on top of the user's."""
    import torch._inductor.config as inductor_config

    patches: dict[str, Any] = dict(_OWN_GRAPHS_OFF)
    on_a_gpu = any(isinstance(spec, TensorSpec) and spec.device.type == "cuda" for spec in piece.input_specs)
    makes_products_itself = inductor_config.max_autotune or inductor_config.max_autotune_gemm
    if on_a_gpu and not makes_products_itself and inductor_config.post_grad_custom_post_pass is None:
        patches["post_grad_custom_post_pass"] = _pass_for_sums()
    return patches


@cache
def _pass_for_sums() -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class SumsApart(CustomGraphPass):  # type: ignore[misc]  # torch says nothing of its type
        """What Inductor runs, and how its cache knows it."""

        def __call__(self, graph: torch.fx.Graph) -> None:
            take_sums_apart(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__,))

    return SumsApart()


def take_sums_apart(graph: torch.fx.Graph) -> int:
    """See Note [sums beside a product]; how many there were."""
    aten, count = torch.ops.aten, 0
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        addend, left, right = node.args
        is_scaled = any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
        if is_scaled or not isinstance(addend, torch.fx.Node) or addend.meta["val"].shape != node.meta["val"].shape:
            continue
        with graph.inserting_before(node):
            product = graph.call_function(aten.mm.default, (left, right))
            product.meta = dict(node.meta)
            total = graph.call_function(aten.add.Tensor, (product, addend))
            total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        count += 1
    return count
