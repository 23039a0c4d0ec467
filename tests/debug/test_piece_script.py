"""Scripts of pieces: they run on their own, tell equal from different, and say what they cannot run."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pp_piecewise_backend as ppb
from checkout import PACKAGE
from dumping import EAGER
from forked import run_program
from models.hf import greedy_decode, make_model, make_prompts
from models.toy_stage import NAMED_OPS, ToyStage
from pp_piecewise_backend.compilation.split import Piece
from pp_piecewise_backend.debug.piece_script import HARNESS_MARK, piece_script, step_text

TIMED = r"eager [\d.]+ us \(fastest [\d.]+\), inductor [\d.]+ us \(fastest [\d.]+\), compiled in"
pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")


@pytest.fixture
def run_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Run a piece's script in this process; its exit code and what it printed."""

    def run(piece: Piece, *arguments: str, ranges: dict[str, tuple[int, int]] | None = None) -> tuple[int, str]:
        path = tmp_path / "piece_00_compute.py"
        path.write_text(piece_script(piece, "Model#0", ranges or {}))
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        return int(ended.value.code or 0), capsys.readouterr().out

    return run


RunScript = Callable[..., tuple[int, str]]
FAST = ("--backend", "eager")


def pieces_of(function: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None) -> list[Piece]:
    torch.compile(function, backend="pp_piecewise", options={**EAGER, "graph_safe_ops": "*", **(options or {})})(*args)
    return [piece for program in ppb.programs() for piece in program.pieces if piece.kind == "compute"]


# ---------------------------------------------------------------------------------- they run


def test_the_file_that_every_script_ends_with_is_a_script_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["piece_harness.py", "s0=5", *FAST])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PACKAGE / "debug" / "piece_harness.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "an example: equal: outputs 1, inputs afterwards 1," in capsys.readouterr().out


def test_a_script_ends_with_that_file_and_defines_all_that_it_uses() -> None:
    (piece,) = pieces_of(lambda x: (x @ x.t()).relu() + 1, torch.randn(3, 4))
    script, harness = piece_script(piece, "Model#0", {}), (PACKAGE / "debug" / "piece_harness.py").read_text()
    written, example = (text.partition(HARNESS_MARK) for text in (script, harness))
    assert written[2] == example[2] and "def main() -> int:" in written[2]
    assert _defined(example[0]) <= _defined(written[0])


def _defined(source: str) -> set[str]:
    """Names that a module binds."""
    bound: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound |= {target.id for target in targets if isinstance(target, ast.Name)}
    return bound


def test_through_inductor(run_script: RunScript) -> None:
    (piece,) = pieces_of(lambda x: (x @ x.t()).relu() + 1, torch.randn(3, 4))
    code, printed = run_script(piece)
    assert code == 0 and ": equal: outputs 1, inputs afterwards 1," in printed
    assert re.search(TIMED, printed)


@pytest.mark.slow  # the same in a process that has imported nothing yet, and that could not import this package
def test_in_a_fresh_process_through_inductor(tmp_path: Path) -> None:
    piece = pieces_of(lambda x: (x @ x.t()).relu() + 1, torch.randn(3, 4))[0]
    path = tmp_path / "piece.py"
    path.write_text(piece_script(piece, "Model#0", {}))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Model#0 piece\[0\]: equal: outputs 1, inputs afterwards 1,", done.stdout)
    assert re.search(TIMED, done.stdout)
    assert "pp_piecewise_backend" not in re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)


@pytest.mark.compat
def test_every_piece_of_a_dynamic_toy_stage(run_script: RunScript) -> None:
    stage = ToyStage(2, first=True, last=True)
    run = torch.compile(stage, backend="pp_piecewise", options={**EAGER, **NAMED_OPS})
    for tokens in (5, 6):
        run(**stage.make_inputs(tokens))
    pieces = [piece for piece in ppb.programs()[-1].pieces if piece.kind == "compute"]
    assert len(pieces) == 3
    for piece in pieces:
        code, printed = run_script(piece, *FAST)
        assert code == 0 and ": equal: " in printed, printed
        (symbol, size) = re.search(r"sizes \{'(\w+)': (\d+)\}", printed).groups()  # type: ignore[union-attr]
        assert size == "6"
        code, printed = run_script(piece, f"{symbol}=9", *FAST)
        assert code == 0 and f"sizes {{'{symbol}': 9}}" in printed


@pytest.mark.compat
@pytest.mark.slow  # the toy stage has pieces of each kind
def test_every_piece_of_a_llama(run_script: RunScript) -> None:
    model = make_model("llama", 2)
    run = torch.compile(model, backend="pp_piecewise", options=EAGER)
    greedy_decode(run, model.config, make_prompts([5]), cache_kind="static", steps=1)
    pieces = [piece for program in ppb.programs() for piece in program.pieces if piece.kind == "compute"]
    assert len(pieces) == 6
    for piece in pieces:
        code, printed = run_script(piece, *FAST)
        assert code == 0 and ": equal: " in printed, printed


def test_written_inputs_are_cloned_and_compared(run_script: RunScript) -> None:
    def step(hidden_states: Tensor, weight: Tensor) -> Tensor:
        hidden_states.mul_(2)
        return hidden_states @ weight

    (piece,) = pieces_of(step, torch.randn(3, 4), torch.randn(4, 4))
    assert run_script(piece, *FAST)[0] == 0
    _register("writes_too_much", lambda graph_module, inputs: _AndThen(graph_module, lambda args: args[0].add_(1)))
    code, printed = run_script(piece, "--backend", "writes_too_much")
    assert code == 1 and "DIFFERENT" in printed and "input l_hidden_states_" in printed


@pytest.mark.compat
def test_a_wrong_compiler_is_found(run_script: RunScript) -> None:
    (piece,) = pieces_of(lambda x: (x @ x, x.argmax()), torch.randn(3, 3))
    _register("off_by_a_bit", lambda graph_module, inputs: lambda *a: (graph_module(*a)[0] * 1.01, graph_module(*a)[1]))
    code, printed = run_script(piece, "--backend", "off_by_a_bit")
    assert code == 1 and "output 0: largest difference" in printed and "output 1" not in printed


def test_a_compiler_that_fails_is_said(run_script: RunScript) -> None:
    def fail(graph_module: object, inputs: object) -> None:
        raise RuntimeError("no such luck")

    (piece,) = pieces_of(lambda x: x @ x, torch.randn(3, 3))
    _register("failing", fail)
    code, printed = run_script(piece, "--backend", "failing")
    assert code == 1 and "failing failed" in printed and "no such luck" in printed


def _register(name: str, backend: Callable[..., Any]) -> None:
    torch._dynamo.register_backend(backend, name=name)


class _AndThen:
    def __init__(self, call: Callable[..., Any], then: Callable[[tuple[Any, ...]], Any]) -> None:
        self.call, self.then = call, then

    def __call__(self, *args: Any) -> Any:
        result = self.call(*args)
        self.then(args)
        return result


# --------------------------------------------------------------------------- the inputs they build


def built_inputs(piece: Piece, ranges: dict[str, tuple[int, int]], tmp_path: Path) -> dict[str, Tensor]:
    path = tmp_path / "script.py"
    path.write_text(piece_script(piece, "Model#0", ranges))
    script = runpy.run_path(str(path))
    return dict(script["build"](script["SIZES"]))


def test_geometry_and_shared_memory(tmp_path: Path) -> None:
    base = torch.randn(40)
    rows, tail, turned = base[:12].view(3, 4), base[8:20].view(3, 4), torch.randn(4, 3).t()
    (piece,) = pieces_of(lambda a, b, c: a @ b.t() @ c, rows, tail, turned)
    built = list(built_inputs(piece, {}, tmp_path).values())
    for made, recorded in zip(built, piece.input_specs, strict=True):
        assert (made.shape, made.stride()) == (recorded.shape, recorded.stride)  # type: ignore[union-attr]
        assert made.storage_offset() == recorded.storage_offset  # type: ignore[union-attr]
    shared = {(spec.storage, made.untyped_storage().data_ptr()) for spec, made in zip(piece.input_specs, built)}  # type: ignore[union-attr]  # noqa: B905
    assert len({storage for storage, _ in shared}) == len({pointer for _, pointer in shared}) == len(shared)


def test_a_run_writes_tensors_of_its_own_that_share_memory_as_recorded(tmp_path: Path) -> None:
    def step(hidden_states: Tensor, tail: Tensor) -> Tensor:
        return hidden_states @ tail.t()

    base = torch.randn(40)
    (piece,) = pieces_of(step, base[:12].view(3, 4), base[8:20].view(3, 4))
    path = tmp_path / "script.py"
    path.write_text(piece_script(piece, "Model#0", {}))
    script = runpy.run_path(str(path))
    built = script["build"]({})
    before = {name: tensor.clone() for name, tensor in built.items()}

    def write_first(piece: object, tensors: dict[str, Tensor], sizes: object) -> tuple[Tensor, ...]:
        tensors["l_hidden_states_"].fill_(7)
        return ()

    seen = script["run"](write_first, None, built, {})
    assert seen["input l_tail_"][0].tolist() == [7.0] * 4, "its first row is the other's last"
    assert torch.equal(seen["input l_tail_"][1:], before["l_tail_"][1:])
    assert all(torch.equal(built[name], before[name]) for name in before)


def test_integers_stay_in_the_recorded_range(tmp_path: Path) -> None:
    def step(positions: Tensor, mask: Tensor, unknown: Tensor, table: Tensor) -> Tensor:
        return torch.where(mask, table[positions], table[unknown]) @ table.t()

    args = (
        torch.tensor([2, 5, 3]),
        torch.tensor([[True], [False], [True]]),
        torch.tensor([1, 1, 1]),
        torch.randn(6, 4),
    )
    (piece,) = pieces_of(step, *args)
    built = built_inputs(piece, {"l_positions_": (2, 5)}, tmp_path)
    assert built["l_positions_"].dtype == torch.int64 and set(built["l_positions_"].tolist()) <= {2, 3, 4, 5}
    assert built["l_unknown_"].tolist() == [0, 0, 0]
    assert built["l_mask_"].dtype == torch.bool


# ------------------------------------------------------------------------------- special contents


def test_uninitialised_outputs_are_left_out(run_script: RunScript) -> None:
    def step(x: Tensor) -> tuple[Tensor, ...]:
        q = x @ x
        filled = torch.empty_like(q)
        filled.copy_(q)
        return q, torch.empty_like(q), torch.empty(3, 4, dtype=q.dtype), filled

    (piece,) = pieces_of(step, torch.randn(3, 3))
    code, printed = run_script(piece, *FAST)
    assert code == 0 and "equal: outputs 2," in printed and "uninitialised and left out 2;" in printed


def test_random_pieces_are_not_compared(run_script: RunScript) -> None:
    (piece,) = pieces_of(lambda x: x @ x + torch.rand_like(x), torch.randn(3, 3))
    code, printed = run_script(piece, *FAST)
    assert code == 0 and "cannot be compared: it draws random numbers" in printed


def test_bodies_of_higher_order_ops_come_along(run_script: RunScript) -> None:
    def step(x: Tensor) -> Tensor:
        return checkpoint(lambda y: (y @ y).sin(), x, use_reentrant=False)  # type: ignore[no-any-return]

    (piece,) = pieces_of(step, torch.randn(3, 3))
    assert "class Piece_body_0" in piece_script(piece, "Model#0", {})
    code, printed = run_script(piece, *FAST)
    assert code == 0 and ": equal: " in printed


def test_autocast_regions(run_script: RunScript) -> None:
    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x

    (piece,) = pieces_of(step, torch.randn(3, 3))
    code, printed = run_script(piece, *FAST)
    assert code == 0 and ": equal: " in printed


@torch.library.custom_op("scripttest::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


@double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_custom_ops_that_are_not_importable_are_said(tmp_path: Path, run_script: RunScript) -> None:
    (piece,) = pieces_of(lambda x: torch.ops.scripttest.double(x @ x), torch.randn(3, 3))
    path = tmp_path / "piece.py"
    path.write_text(piece_script(piece, "Model#0", {}))
    alone = run_program(path, *FAST)
    assert alone.exit_code == 0, alone.log
    assert "cannot run here: the custom op scripttest::double is not registered" in alone.log
    assert "--import MODULE" in alone.log
    (tmp_path / "registers.py").write_text(
        "import torch\n@torch.library.custom_op('scripttest::double', mutates_args=())\n"
        "def double(x: torch.Tensor) -> torch.Tensor:\n    return x * 2\n"
        "@double.register_fake\ndef _(x):\n    return torch.empty_like(x)\n"
    )
    told = run_program(path, *FAST, "--import", "registers")
    assert told.exit_code == 0 and ": equal: " in told.log, told.log


def test_functions_of_the_user(run_script: RunScript) -> None:
    code, printed = run_script(pieces_of(lambda x: left_alone(x @ x), torch.randn(3, 3))[0], *FAST)
    assert code == 0 and ": equal: " in printed  # found again by module and name


def test_a_closure_is_said(run_script: RunScript) -> None:
    local = torch._dynamo.allow_in_graph(lambda x: x * 3)
    code, printed = run_script(pieces_of(lambda x: local(x @ x), torch.randn(3, 3))[0], *FAST)
    assert code == 0 and "which cannot be imported from anywhere" in printed


@torch._dynamo.allow_in_graph
def left_alone(x: Tensor) -> Tensor:
    return x * 3


def test_hostile_names_stay_text(run_script: RunScript) -> None:
    (piece,) = pieces_of(lambda x: x @ x, torch.randn(3, 3))
    text = piece_script(piece, 'Model"""\n\nraise SystemExit(7)\n"""#0', {})
    compile(text, "piece.py", "exec")
    assert (
        "SystemExit(7)"
        not in re.sub(r'^""".*?"""', "", text, count=1, flags=re.DOTALL)
        .replace("PIECE = ", "", 1)
        .split("CUSTOM_OPS")[1]
    )


def test_wrong_sizes_are_an_error(run_script: RunScript, capsys: pytest.CaptureFixture[str]) -> None:
    (piece,) = pieces_of(lambda x: x @ x, torch.randn(3, 3))
    code, _ = run_script(piece, "s9=4")
    assert code == 2


def test_eager_steps_are_text() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = (x @ x)[None, None]
            return nn.functional.scaled_dot_product_attention(q, q, q) @ x

    pieces_of(Model(), torch.randn(3, 3))
    (eager,) = (piece for piece in ppb.programs()[0].pieces if piece.kind == "eager")
    text = step_text(eager, "Model#0")
    assert "why: split op scaled_dot_product_attention" in text
    assert "torch._C._nn.scaled_dot_product_attention(" in text and "float32[1, 1, 3, 3]" in text
