"""The entry point: settings, the ways out to the stock backends, the registry, and what it reports."""

from __future__ import annotations

import copy
import gc
import io
import logging
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

import pp_piecewise_backend as ppb
from models.toy_stage import NAMED_OPS, ToyStage
from pp_piecewise_backend import errors
from pp_piecewise_backend.backend import backend
from pp_piecewise_backend.runtime.program import Program, UnsplitProgram

HIDDEN = 8
EAGER = {"compiler": "eager"}


pytestmark = pytest.mark.usefixtures("fresh_backend")


def compiled(function: Callable[..., Any], options: dict[str, Any] | None = None, **more: Any) -> Any:
    return torch.compile(function, backend="pp_piecewise", options={**EAGER, **(options or {})}, **more)


def raised(call: Callable[[], Any], kind: type[BaseException]) -> str:
    """The text of the error of ``kind`` that ``call`` raises, itself or as the cause of Dynamo's."""
    with pytest.raises(Exception) as caught:
        call()
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    assert error is not None, f"no {kind.__name__} behind {caught.value!r}"
    assert str(error) in str(caught.value), "the user sees the sentence in the error that is raised"
    return str(error)


def attend(x: Tensor) -> Tensor:
    q = x[None, None]
    return torch.nn.functional.scaled_dot_product_attention(q, q, q)[0, 0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(attend(self.first(x)))


# ------------------------------------------------------------------------------ settings


@pytest.mark.compat
def test_options_beat_environment_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PP_PIECEWISE_COMPILER", "aot_eager")
    monkeypatch.setenv("PP_PIECEWISE_MAX_TOKENS", "64")
    with torch.no_grad():
        torch.compile(Model(), backend="pp_piecewise", options={"compiler": "eager"})(torch.randn(3, HIDDEN))
    (program,) = ppb.programs()
    assert (program.config.compiler, program.config.max_tokens) == ("eager", 64)
    assert program.config.padding == "tested"


def test_environment_is_read_at_each_call_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        for compiler in ("eager", "aot_eager"):
            monkeypatch.setenv("PP_PIECEWISE_COMPILER", compiler)
            torch._dynamo.reset()
            torch.compile(Model(), backend="pp_piecewise")(torch.randn(3, HIDDEN))
            assert ppb.programs()[-1].config.compiler == compiler


def test_disabled_is_stock_inductor_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as compile_fx_module

    given: list[Any] = []
    original = compile_fx_module.compile_fx

    def recording(graph_module: Any, *args: Any, **kwargs: Any) -> Any:
        given.append((graph_module.graph, [str(node) for node in graph_module.graph.nodes], kwargs))
        return original(graph_module, *args, **kwargs)

    monkeypatch.setattr(compile_fx_module, "compile_fx", recording)
    monkeypatch.setenv("PP_PIECEWISE", "0")
    model, x = Model(), torch.randn(3, HIDDEN)
    with ppb.expect(programs=0, pieces=0, grad_fallbacks=0, recompiles=0), warnings.catch_warnings():
        warnings.simplefilter("error", errors.PPPiecewiseWarning)
        output = torch.compile(model, backend="pp_piecewise")(x)
        output.sum().backward()  # gradients as ever
    torch.testing.assert_close(output, model(x))
    assert model.first.weight.grad is not None
    assert ppb.programs() == ()
    ((_, names, kwargs),) = given
    assert any("scaled_dot_product_attention" in name for name in names) and kwargs == {}


def test_option_enabled_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PP_PIECEWISE", "0")
    with torch.no_grad():
        compiled(Model(), {"enabled": True})(torch.randn(3, HIDDEN))
    (program,) = ppb.programs()
    assert isinstance(program, Program)


def test_the_stage_is_among_the_valid_options() -> None:
    text = raised(lambda: compiled(Model(), {"stagee": None})(torch.randn(3, HIDDEN)), errors.ConfigError)
    assert "nearest valid name is 'stage'" in text and text.endswith(", stage.")


def save_and_load(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [copy.deepcopy, save_and_load])
@pytest.mark.parametrize("options", [{}, {"graphs": "emulate"}])
def test_copies_of_a_compiled_module_work(copied: Callable[[Any], Any], options: dict[str, Any]) -> None:
    run, x = compiled(Model().eval(), options), torch.randn(3, HIDDEN)
    with torch.no_grad():
        expected = [run(x) for _ in range(3)][-1]  # by now it has programs, and graphs if they are on
        copied_run = copied(run)
        for parameter in run.parameters():
            parameter.zero_()
        assert all(torch.equal(copied_run(x), expected) for _ in range(3))
    assert copied(backend) is backend


@pytest.mark.compat
def test_unknown_option_reaches_the_user_with_the_nearest_name() -> None:
    run = compiled(Model(), {"split_opps": "x"})
    text = raised(lambda: run(torch.randn(3, HIDDEN)), errors.ConfigError)
    assert "'split_opps'" in text and "nearest valid name is 'split_ops'" in text


def test_bad_environment_value_reaches_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PP_PIECEWISE_MAX_TOKENS", "many")
    text = raised(lambda: compiled(Model())(torch.randn(3, HIDDEN)), errors.ConfigError)
    assert "environment variable PP_PIECEWISE_MAX_TOKENS has the value 'many'" in text


@pytest.mark.compat
def test_mode_keyword_has_its_own_error() -> None:
    run = torch.compile(Model(), backend="pp_piecewise", mode="reduce-overhead")
    text = raised(lambda: run(torch.randn(3, HIDDEN)), errors.ConfigError)
    assert text.startswith("mode='reduce-overhead' was passed to torch.compile") and "Remove mode=" in text


def test_unknown_keywords_of_a_direct_call() -> None:
    graph_module = symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(errors.ConfigError, match="keyword arguments 'fullgraph', 'verbose'"):
        backend(graph_module, [torch.randn(3, 2)], verbose=True, fullgraph=True)


# ----------------------------------------------------------------------------- gradients


@pytest.mark.compat
def test_gradients_go_to_the_stock_backend_with_one_warning() -> None:
    model, x = Model(), torch.randn(3, HIDDEN)
    run = compiled(model)
    text = r"to serve, call .*gradients are required by 'self\.\w+\.\w+', 'self\.\w+\.\w+' and 2 more, so"
    with pytest.warns(errors.PPPiecewiseWarning, match=text) as warned:
        for _ in range(3):
            output = run(x)
    assert len([w for w in warned if issubclass(w.category, errors.PPPiecewiseWarning)]) == 1
    output.sum().backward()
    got = model.first.weight.grad
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(got, model.first.weight.grad)
    (program,) = ppb.programs()
    assert isinstance(program, UnsplitProgram)
    assert program.stats.grad_fallbacks == program.stats.calls == ppb.stats().grad_fallbacks == 3
    assert "gradients are required" in program.explain()


def test_gradient_of_an_argument_alone() -> None:
    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return attend(x) * scale

    scale = torch.ones((), requires_grad=True)
    with pytest.warns(errors.PPPiecewiseWarning, match="required by 'scale', so"):
        compiled(forward)(torch.randn(3, HIDDEN), scale).sum().backward()
    assert scale.grad is not None


def test_gradients_through_history_are_kept() -> None:
    base = torch.randn(3, HIDDEN, requires_grad=True)
    with pytest.warns(errors.PPPiecewiseWarning):
        compiled(attend)(base * 2).sum().backward()
    assert base.grad is not None


@pytest.mark.compat
def in_inference_mode(model: Model, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)  # type: ignore[no-any-return]


def in_nested_modes(model: Model, x: Tensor) -> Tensor:
    with torch.inference_mode(), torch.inference_mode():
        x = model.first(x)
    with torch.no_grad():
        return model.second(attend(x))


@pytest.mark.parametrize("function", [torch.inference_mode()(Model.forward), in_inference_mode, in_nested_modes])
def test_what_runs_in_inference_mode_inside_needs_no_gradients(function: Callable[[Model, Tensor], Tensor]) -> None:
    model, x = Model(), torch.randn(3, HIDDEN)
    run = compiled(function, {"graphs": "emulate"})
    with ppb.expect(grad_fallbacks=0):
        for _ in range(4):
            assert torch.equal(run(model, x), function(model, x)) and not run(model, x).requires_grad
    assert ppb.stats().replays > 0


def test_what_runs_after_an_inference_mode_inside_may_need_gradients() -> None:
    def function(model: Model, x: Tensor) -> Tensor:
        with torch.inference_mode():
            scale = attend(x).mean()
        return model.second(x) * float(scale > 0)

    with pytest.warns(errors.PPPiecewiseWarning, match="gradients are required"):
        assert compiled(function)(Model(), torch.randn(3, HIDDEN)).requires_grad


def test_gradients_are_an_error_under_strict() -> None:
    run = compiled(Model(), {"strict": True})
    text = raised(lambda: run(torch.randn(3, HIDDEN)), errors.GradientFallback)
    assert "torch.inference_mode()" in text


class NoGradInside(Model):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.compat
@pytest.mark.parametrize("case", ["no-grad", "inference-mode", "no-grad-inside", "decorated", "frozen", "detached"])
def test_parameters_that_require_gradients_do_not_matter_where_no_result_does(case: str) -> None:
    model, x = Model(), torch.randn(3, HIDDEN)
    wanted = model(x).detach()
    function: Callable[..., Any] = model
    context: Any = warnings.catch_warnings()
    if case == "no-grad":
        context = torch.no_grad()
    elif case == "inference-mode":
        context = torch.inference_mode()
    elif case == "no-grad-inside":
        function = NoGradInside()
        function.load_state_dict(model.state_dict())
    elif case == "decorated":
        function = torch.no_grad()(lambda value: model(value))
    elif case == "frozen":
        model.requires_grad_(False)
    else:
        function = lambda value: model(value).detach()  # noqa: E731
    run = compiled(function)
    with warnings.catch_warnings(), context:
        warnings.simplefilter("error", errors.PPPiecewiseWarning)
        output = run(x)
    torch.testing.assert_close(output, wanted)
    assert not output.requires_grad
    assert output.is_inference() == (case == "inference-mode")
    (program,) = ppb.programs()
    assert isinstance(program, Program) and program.stats.calls == 1


def test_one_model_with_and_without_gradients() -> None:
    model, x = Model(), torch.randn(3, HIDDEN)
    run = compiled(model)
    with torch.no_grad():
        first = run(x)
    with pytest.warns(errors.PPPiecewiseWarning):
        second = run(x)
    with torch.no_grad():
        third = run(x)
    assert (first.requires_grad, second.requires_grad, third.requires_grad) == (False, True, False)
    torch.testing.assert_close(first, second.detach())
    torch.testing.assert_close(first, third)
    assert [type(program).__name__ for program in ppb.programs()] == ["Program", "UnsplitProgram"]
    assert [program.stats.calls for program in ppb.programs()] == [2, 1]


# ------------------------------------------------------------------------------ registry


@pytest.mark.compat
@torch.no_grad()
def test_reset_through_dynamo() -> None:
    model, x = Model(), torch.randn(3, HIDDEN)
    with ppb.expect(pieces_compiled=2, pieces_reused=0):
        compiled(lambda value: model(value))(x)
    with ppb.expect(pieces_compiled=0, pieces_reused=2):
        compiled(lambda value: model(value))(x)
    assert len(ppb.programs()) == 2
    torch._dynamo.reset()
    assert ppb.programs() == ()
    with ppb.expect(pieces_compiled=2, pieces_reused=0, recompiles=0):
        compiled(lambda value: model(value))(x)


@torch.no_grad()
def test_reset_zeroes_the_counters_and_old_programs_still_run() -> None:
    model, x = Model(), torch.randn(3, HIDDEN)
    run = compiled(model)
    run(x)
    ppb.reset()
    assert ppb.stats().calls == 0 and ppb.programs() == ()
    torch.testing.assert_close(run(x), model(x))
    assert ppb.stats().calls == 1


@pytest.mark.compat
@torch.no_grad()
def test_programs_are_listed_oldest_first_and_held_weakly() -> None:
    runs = [compiled(function) for function in (lambda x: attend(x) + 1, lambda x: attend(x) + 2)]
    for run in runs:
        run(torch.randn(3, HIDDEN))
    first, second = ppb.programs()
    assert [type(p) for p in (first, second)] == [Program, Program]
    (output,) = second(*(torch.zeros(3, HIDDEN) for _ in second.inputs))
    torch.testing.assert_close(output, torch.full((3, HIDDEN), 2.0))
    references = [weakref.ref(first), weakref.ref(second)]
    del first, second, runs, run
    torch._dynamo.reset_code_caches()
    gc.collect()
    alive = [reference() for reference in references]
    assert list(ppb.programs()) == [program for program in alive if program is not None]


@pytest.mark.compat
@torch.no_grad()
def test_recompiles_are_counted_per_code() -> None:
    run = compiled(Model())
    with ppb.expect(programs=3, recompiles=2):
        for tokens in (5, 6, 1):
            run(torch.randn(tokens, HIDDEN))
    assert [program.name for program in ppb.programs()] == ["Model#0", "Model#1", "Model#2"]
    with ppb.expect(programs=1, recompiles=0):
        compiled(lambda x: attend(x))(torch.randn(3, HIDDEN))
    assert ppb.programs()[-1].name == "<lambda>#0"
    compiled(nn.Sequential(nn.Linear(HIDDEN, HIDDEN)), {})(torch.randn(3, HIDDEN))  # called in a wrapper of Dynamo
    assert ppb.programs()[-1].name == "Sequential#0"


@torch.no_grad()
def test_fullgraph() -> None:
    model, x = Model(), torch.randn(3, HIDDEN)
    torch.testing.assert_close(compiled(model, fullgraph=True)(x), model(x), rtol=0, atol=0)


@torch.no_grad()
def test_graph_breaks() -> None:
    class Broken(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = attend(self.first(x))
            torch._dynamo.graph_break()
            return self.second(attend(x))

    model, x = Broken(), torch.randn(3, HIDDEN)
    torch.testing.assert_close(compiled(model)(x), model(x), rtol=0, atol=0)
    assert [program.stats.calls for program in ppb.programs()] == [1, 1]
    report = ppb.explain()
    assert "graph breaks" in report and report.startswith("2 live programs")


@torch.no_grad()
def test_several_models_do_not_disturb_one_another() -> None:
    models = [Model() for _ in range(3)] + [ToyStage(1, first=True, last=True)]
    run = [compiled(model, NAMED_OPS if isinstance(model, ToyStage) else None) for model in models]
    x = torch.randn(3, HIDDEN)
    for _ in range(2):
        for model, call in zip(models, run, strict=True):
            if isinstance(model, ToyStage):
                inputs = model.make_inputs(3)
                torch.testing.assert_close(call(**inputs), model(**inputs), rtol=0, atol=0)
            else:
                torch.testing.assert_close(call(x), model(x), rtol=0, atol=0)
    assert sum(program.stats.calls for program in ppb.programs()) == 8


@torch.no_grad()
def test_nested_compile() -> None:
    inner = compiled(Model())

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner
            self.linear = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.inner(x))

    outer, x = Outer(), torch.randn(3, HIDDEN)
    wanted = outer.linear(inner._orig_mod(x))
    torch.testing.assert_close(compiled(outer)(x), wanted, rtol=0, atol=0)
    assert ppb.stats().calls >= 1


@torch.no_grad()
def test_threads_compile_at_the_same_time() -> None:
    models = [nn.Sequential(*(Model() for _ in range(1 + index % 2))) for index in range(4)]
    x = torch.randn(3, HIDDEN)
    wanted = [model(x) for model in models]
    runs = [compiled(model) for model in models]
    outputs: dict[int, Any] = {}
    barrier = threading.Barrier(len(models))

    def work(index: int) -> None:
        with torch.no_grad():
            barrier.wait(timeout=60)
            try:
                outputs[index] = runs[index](x)
            except Exception as error:
                outputs[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    for index, expected in enumerate(wanted):
        assert isinstance(outputs[index], Tensor), outputs[index]
        torch.testing.assert_close(outputs[index], expected, rtol=0, atol=0)
    assert sum(program.stats.calls for program in ppb.programs()) == len(models)


# ------------------------------------------------------------------- graphs that are not split


@pytest.mark.compat
@torch.no_grad()
def test_sparse_input_goes_to_the_stock_backend() -> None:
    def forward(x: Tensor, table: Tensor) -> Tensor:
        return attend(torch.sparse.mm(table, x))

    table, x = torch.eye(3).to_sparse(), torch.randn(3, HIDDEN)
    # Dynamo breaks its graph at sparse tensors, so only other tracers bring one here.
    program = backend(symbolic_trace(forward), [x, table], options=EAGER)
    torch.testing.assert_close(program(x, table), forward(x, table), rtol=0, atol=0)
    assert isinstance(program, UnsplitProgram) and program.stats.calls == 1
    assert "has layout torch.sparse_coo" in program.explain() and program.explain() in ppb.explain()


@torch.no_grad()
def test_tensor_subclass_input_goes_to_the_stock_backend(caplog: pytest.LogCaptureFixture) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    def forward(x: Any) -> Any:
        return x * 2 + 1

    x = TwoTensor(torch.ones(3), torch.zeros(3))
    _assert_unsplit(forward, (x,), "is a tensor subclass (TwoTensor)", caplog, lambda value: value.a)


@torch.no_grad()
def test_metadata_mutation_is_right(caplog: pytest.LogCaptureFixture) -> None:
    def forward(x: Tensor, y: Tensor) -> Tensor:
        x.transpose_(0, 1)
        return attend(y) + x.t()

    def arguments() -> tuple[Tensor, Tensor]:
        return torch.ones(3, HIDDEN), torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))

    eager, ours = arguments(), arguments()
    wanted = forward(*eager)
    got = compiled(forward)(*ours)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert ours[0].shape == eager[0].shape == (HIDDEN, 3) and ours[0].stride() == eager[0].stride()


def _assert_unsplit(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    reason: str,
    caplog: pytest.LogCaptureFixture,
    plain: Callable[[Any], Any] = lambda value: value,
) -> None:
    run = compiled(function)
    with caplog.at_level(logging.WARNING, logger="pp_piecewise_backend"):
        for _ in range(2):
            torch.testing.assert_close(plain(run(*args)), plain(function(*args)), rtol=0, atol=0)
    (program,) = ppb.programs()
    assert isinstance(program, UnsplitProgram) and program.stats.calls == 2
    assert reason in program.explain() and reason in ppb.explain()
    assert len([record for record in caplog.records if reason in record.getMessage()]) == 1


@pytest.mark.compat
@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=2)
def test_recompile_limit_is_reported() -> None:
    def forward(x: Tensor, kind: str) -> Tensor:
        return attend(x) + len(kind)

    run = compiled(forward)
    x = torch.randn(3, HIDDEN)
    for kind in ("a", "bb", "ccc", "dddd"):
        torch.testing.assert_close(run(x, kind), forward(x, kind))
    assert sum(program.stats.calls for program in ppb.programs()) == 2
    assert "recompile_limit" in ppb.explain() and "given up by Dynamo" in ppb.explain()
    torch._dynamo.reset()
    assert "given up by Dynamo" not in ppb.explain()


# ------------------------------------------------------------------------- without Dynamo


@pytest.mark.compat
@torch.no_grad()
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_direct_call_with_real_inputs(compiler: str) -> None:
    model, x = Model(), torch.randn(3, HIDDEN)
    program = backend(symbolic_trace(model), [x], options={"compiler": compiler})
    assert isinstance(program, Program) and program.name == "graph"
    (got,) = _as_tuple(program(x))
    torch.testing.assert_close(got, model(x))
    assert [piece.kind for piece in program.pieces] == ["compute", "eager", "compute"]
    assert [i.source for i in program.inputs] == [""]


@torch.no_grad()
def test_exported_graph() -> None:
    model, x = Model(), torch.randn(3, HIDDEN)
    exported = torch.export.export(model, (x,)).module()
    run = torch.compile(exported, backend="pp_piecewise", options=EAGER)
    torch.testing.assert_close(run(x), model(x), rtol=0, atol=0)
    (program,) = ppb.programs()
    assert isinstance(program, Program) and "eager" in {piece.kind for piece in program.pieces}


def test_direct_call_with_the_wrong_number_of_inputs_explains_itself() -> None:
    graph_module = symbolic_trace(nn.Linear(2, 2))
    with torch.no_grad():
        program = backend(graph_module, [], options=EAGER)
    assert isinstance(program, UnsplitProgram)
    assert "1 placeholders but 0 example inputs" in program.explain()


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


# ---------------------------------------------------------------------------- split ops


@pytest.mark.compat
@torch.no_grad()
def test_a_given_split_op_that_matches_nothing() -> None:
    run = compiled(Model(), {"split_ops": "my_attention"})
    with (
        ppb.expect(unmatched_split_ops=1),
        pytest.warns(errors.PPPiecewiseWarning, match="'my_attention' matched no op.*scaled_dot_product_attention"),
    ):
        run(torch.randn(3, HIDDEN))
    (program,) = ppb.programs()
    assert [piece.kind for piece in program.pieces] == ["compute"]
    assert "scaled_dot_product_attention" in program.explain()


@torch.no_grad()
def test_a_given_split_op_that_matches_nothing_under_strict() -> None:
    run = compiled(Model(), {"split_ops": "+my_attention", "strict": True})
    text = raised(lambda: run(torch.randn(3, HIDDEN)), errors.UnmatchedName)
    assert "'my_attention' matched no op" in text


# ---------------------------------------------------------------------------- stage inputs

UNMATCHED = "stage inputs 'y' matched no input of the graph. Its tensor inputs are 'x'."


@pytest.mark.parametrize("given", ["stage", "names"])
@torch.no_grad()
def test_a_stage_input_that_matches_nothing_is_reported(given: str) -> None:
    def run(**options: Any) -> None:
        stage = ppb.Stage({"y": ppb.Proxy((HIDDEN,), torch.float32)}, 8, "cpu")
        names = {"stage": stage} if given == "stage" else {"stage_inputs": "y"}
        compiled(Model(), {**names, **options})(torch.randn(3, HIDDEN))

    with pytest.warns(errors.PPPiecewiseWarning, match=UNMATCHED):
        run()
    assert UNMATCHED in raised(lambda: run(strict=True), errors.UnmatchedName)


@torch.no_grad()
def test_between_graph_breaks_each_graph_has_some_of_the_stage_inputs() -> None:
    class BrokenStage(Model):
        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            x = super().forward(x + residual)
            torch._dynamo.graph_break()
            return x @ x.T

    proxy = ppb.Proxy((HIDDEN,), torch.float32)
    stage = ppb.Stage({"x": proxy, "residual": proxy}, 8, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.PPPiecewiseWarning)
        compiled(BrokenStage(), {"stage": stage})(torch.randn(3, HIDDEN), torch.randn(3, HIDDEN))
    assert len(ppb.programs()) == 2


# ------------------------------------------------------------------------------------- seal


@pytest.mark.usefixtures("no_gradients")
def test_a_sealed_backend_runs_new_graphs_eagerly_and_says_so() -> None:
    model = Model()
    run = compiled(model)
    run(torch.randn(3, HIDDEN))
    ppb.seal()
    with ppb.expect(programs=0, recompiles_after_seal=0, calls=1):
        run(torch.randn(3, HIDDEN))
    x = torch.randn(5, HIDDEN)
    with (
        ppb.expect(programs=0, pieces_compiled=0, recompiles=0, recompiles_after_seal=1, calls=0),
        pytest.warns(errors.PPPiecewiseWarning, match=r"for forward arrived after seal\(\), next to its 1 "),
    ):
        torch.testing.assert_close(run(x), model(x), rtol=0, atol=0)
    assert len(ppb.programs()) == 1


@pytest.mark.usefixtures("no_gradients")
def test_a_sealed_backend_refuses_new_graphs_under_strict() -> None:
    run = compiled(Model(), {"strict": 1})
    run(torch.randn(3, HIDDEN))
    ppb.seal()
    text = raised(lambda: run(torch.randn(5, HIDDEN)), errors.RecompileAfterSeal)
    assert "unseal()" in text
    assert ppb.stats().recompiles_after_seal == 1


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("end", [ppb.unseal, ppb.reset, torch._dynamo.reset])
def test_what_ends_a_seal(end: Callable[[], None]) -> None:
    compiled(Model())(torch.randn(3, HIDDEN))  # Dynamo resets the backends that it knows
    ppb.seal()
    end()
    with ppb.expect(programs=1, recompiles_after_seal=0):
        compiled(Model())(torch.randn(5, HIDDEN))


@pytest.mark.usefixtures("no_gradients")
def test_a_seal_leaves_a_disabled_backend_alone() -> None:
    ppb.seal()
    with ppb.expect(recompiles_after_seal=0), warnings.catch_warnings():
        warnings.simplefilter("error", errors.PPPiecewiseWarning)
        compiled(Model(), {"enabled": 0})(torch.randn(3, HIDDEN))


@pytest.mark.usefixtures("no_gradients")
def test_a_seal_is_no_seal_on_options() -> None:
    ppb.seal()
    assert "'stge'" in raised(lambda: compiled(Model(), {"stge": None})(torch.randn(3, HIDDEN)), errors.ConfigError)
