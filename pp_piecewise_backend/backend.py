"""The entry point: ``torch.compile(model, backend="pp_piecewise")``. Start reading here."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import CodeType
from typing import Any

import torch
from torch.fx import GraphModule

from . import errors
from .compilation.analysis import collect_facts
from .compilation.attention import SplitOpMatcher, unknown_op
from .compilation.inductor import CompiledPiece, PieceCompiler
from .compilation.placeholders import InputTable, classify_inputs
from .compilation.specs import SymbolSpec, TensorSpec, symbols_of
from .compilation.split import Split, split_graph
from .config import Config
from .debug import dump
from .debug.describe import describe
from .debug.explain import explain as explanation
from .debug.explain import explain_all
from .runtime.capture_plan import GraphKind
from .runtime.cudagraphs.foreign import capture_is_under_way
from .runtime.hooks import Events
from .runtime.program import Program, UnsplitProgram
from .runtime.stage import Proxy, Stage
from .runtime.warmup import MakeInputs, warm_up
from .utils import torch_compat
from .utils.counters import TOTALS, Stats

_LOG = logging.getLogger(__name__)

AnyProgram = Program | UnsplitProgram


class PiecewiseBackend:
    """What Dynamo calls with each graph. One per process; threads may call it at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compiler = PieceCompiler()
        self._row_verdicts: dict[object, str | None] = {}
        self._programs: weakref.WeakValueDictionary[int, AnyProgram] = weakref.WeakValueDictionary()
        """By id, oldest first."""
        self._dynamo_before = (0, 0)
        self._graphs_of_code: weakref.WeakKeyDictionary[CodeType, int] = weakref.WeakKeyDictionary()
        self._stages: weakref.WeakValueDictionary[tuple[object, ...], Stage] = weakref.WeakValueDictionary()
        """Stages made here, by code, module instance and what lands in them: its programs share one."""
        self._sealed = False
        self.dumps = dump.Dumps()
        atexit.register(self.dumps.close)

    def __reduce__(self) -> str:
        """Copies and pickles of a compiled module name the one backend of their process; programs are not copied."""
        return "backend"

    def __call__(
        self,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        *,
        options: Mapping[str, object] | None = None,
        mode: str | None = None,
        **unknown: object,
    ) -> Callable[..., Any]:
        """Build the program for one graph. Dynamo calls it; see docs/options.md for the options.

        Raises:
            ConfigError: an option or environment variable is wrong.
            UnmatchedName, GradientFallback: under ``strict``.
            PPPiecewiseError: somebody captures a graph around the call.
        """
        if mode is not None:
            raise errors.ConfigError(errors.unsupported_mode_keyword(mode))
        if unknown:
            raise errors.ConfigError(errors.unsupported_keywords(sorted(unknown)))
        config, stage = _read_options(options)
        if not config.enabled:
            return torch_compat.stock_backend("inductor")(graph_module, list(example_inputs))
        if self._sealed:
            return self._refuse_after_seal(graph_module, config, _stats_of(stage))
        if capture_is_under_way():
            frame = torch_compat.frame_being_compiled()
            what = "a graph" if frame is None else frame[0].co_name
            raise errors.PPPiecewiseError(errors.compiled_in_a_capture(what))
        # As Dynamo does in a frame, and ``aot_compile`` does not: what is made under inference mode skips the keys
        # by which ops are decomposed.
        needs_gradients = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(needs_gradients):
            return self._program(graph_module, example_inputs, config, stage)

    def _program(
        self, graph_module: GraphModule, example_inputs: Sequence[Any], config: Config, stage: Stage | None
    ) -> AnyProgram:
        name, number = self._count_graph(_stats_of(stage))
        events = self.dumps.start(name, config)
        events.traced(graph_module, example_inputs)
        matcher = SplitOpMatcher.from_config(config.split_ops, config.graph_safe_ops)
        try:
            split, table = self._split(graph_module, example_inputs, config, stage, matcher)
            if _guard_sizes(split, table, is_first=number == 0):
                split, table = self._split(graph_module, example_inputs, config, stage, matcher)
                table = table.with_checked_rows()
        except (errors.SplitError, errors.GradientFallback) as error:
            program: AnyProgram = _unsplit(name, graph_module, example_inputs, config, stage, error)
        except Exception as error:
            # A graph that we do not understand must still run; the traceback is for the report of the bug.
            _LOG.error("%s: internal error while splitting", name, exc_info=True)
            refusal = errors.SplitError(errors.internal_error(error))
            program = _unsplit(name, graph_module, example_inputs, config, stage, refusal)
        else:
            events.split(split, table)
            _report_unmatched(config, stage, matcher, table, split)
            program = self._build(name, split, table, config, stage, events)
        with self._lock:
            self._programs[id(program)] = program
        events.built(program)
        dump.trace_program(program)
        return program

    def reset(self) -> None:
        """Forget programs and compiled pieces. ``torch._dynamo.reset()`` calls it too."""
        self.dumps.close()
        with self._lock:
            for program in tuple(self._programs.values()):
                program.release()
            self._programs.clear()
            self._graphs_of_code.clear()
            self._stages.clear()
            self._sealed = False
            self._compiler.reset()
            self._row_verdicts.clear()
            # Dynamo's own counters outlive its reset.
            self._dynamo_before = torch_compat.frames_given_up_and_graph_breaks()

    def seal(self) -> None:
        """Refuse further graphs: a new kind of input runs eagerly, with a warning and a counter (``strict``: an error).

        Call it after ``warmup()``. ``unseal()`` and ``reset()`` end it.
        """
        self._sealed = True
        for program in self.programs():
            program.events.sealed()

    def unseal(self) -> None:
        """Compile new graphs again."""
        self._sealed = False

    def programs(self) -> tuple[AnyProgram, ...]:
        """The live programs of this process, oldest first."""
        with self._lock:
            return tuple(self._programs.values())

    def explain(self) -> str:
        """What was split where and why, for every live program of this process."""
        texts = [program.explain() for program in self.programs()]
        now, before = torch_compat.frames_given_up_and_graph_breaks(), self._dynamo_before
        return explain_all(texts, frames_given_up=now[0] - before[0], graph_breaks=now[1] - before[1])

    # ------------------------------------------------------------------------ building

    def _split(
        self,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        config: Config,
        stage: Stage | None,
        matcher: SplitOpMatcher,
    ) -> tuple[Split, InputTable]:
        facts = collect_facts(graph_module, example_inputs)
        table = classify_inputs(facts, _tail_ranks(config, stage))
        if facts.needs_gradient:
            sources = {i.name: i.readable or i.label for i in table.inputs}
            names = [sources[name] for name in facts.needs_gradient]
            raise errors.GradientFallback(errors.gradient_fallback(names, config.compiler))
        facts = facts.with_equal_symbols(table.equal_symbols)

        def cut(whole: bool) -> Split:
            return split_graph(facts, table, matcher, whole, config.row_wise_ops, self._row_verdicts)

        split = cut(config.mode == "full")
        if config.mode in ("auto", "full_and_piecewise") and _graph_kind(config, table)[0] is not None:
            unknown = unknown_op(facts, matcher) if config.mode == "auto" else None
            in_one: Split | str
            try:
                in_one = cut(True) if unknown is None else errors.not_known_graph_safe(unknown)
            except errors.SplitError as error:
                in_one = str(error)
            split = replace(split, in_one=in_one)
        return split, table

    def _build(
        self, name: str, split: Split, table: InputTable, config: Config, stage: Stage | None, events: Events
    ) -> Program:
        started = time.perf_counter()
        compiled: list[CompiledPiece | None] = []
        reused: list[bool] = []
        for piece in split.pieces:
            if piece.kind == "eager":
                compiled.append(None)
                continue
            result, was_known = self._compiler.compile(piece, config)
            compiled.append(result)
            reused.append(was_known)
            (events.reused if was_known else events.compiled)(piece, result)
            if result.failure is not None and not was_known:
                _LOG.warning("%s piece[%d]: %s; it runs as plain FX", name, piece.index, result.failure)
        graph_kind, reason = _graph_kind(config, table)
        if graph_kind is not None:
            stage = self._stage_for(table, config.max_tokens) if stage is None else _checked(stage, table)
        elif config.graphs == "cuda" and config.mode != "none":
            warnings.warn(reason, errors.PPPiecewiseWarning, stacklevel=2)
        program = Program(
            name,
            split,
            table,
            compiled,
            config,
            stage=stage,
            graph_kind=graph_kind,
            graphs_off_reason=reason,
            events=events,
            explain=_explain,
        )
        program.stats.add_many(
            {
                "programs": 1,
                "pieces": len(reused),
                "pieces_compiled": reused.count(False),
                "pieces_reused": reused.count(True),
                "compile_seconds": time.perf_counter() - started,
            }
        )
        _log_program(program)
        return program

    def _stage_for(self, table: InputTable, max_tokens: int) -> Stage | None:
        """Landing memory for a program that was given none, shared with other programs of the same module."""
        proxies: dict[str, Proxy] = {}
        device: torch.device | None = None
        for graph_input in table.of_kind("stage-input"):
            spec, dim = graph_input.spec, graph_input.token_dim
            if spec is None or dim is None or any(size != 1 for size in spec.shape[:dim]):
                continue
            tail = tuple(size for size in spec.shape[dim + 1 :] if isinstance(size, int))
            if len(tail) == len(spec.shape) - dim - 1 and all(tail) and device in (None, spec.device):
                proxies[graph_input.label] = Proxy(tail, spec.dtype)
                device = spec.device
        if not proxies:
            return None
        frame = torch_compat.frame_being_compiled()
        code, owner = (None, None) if frame is None else (frame[0], frame[1].get("self"))
        key = (code, id(owner), tuple(proxies.items()), max_tokens, device)
        with self._lock:
            stage = self._stages.get(key)
            if stage is None:
                stage = self._stages[key] = Stage(proxies, max_tokens, device)
        return stage

    def _refuse_after_seal(self, graph_module: GraphModule, config: Config, stats: Stats) -> Callable[..., Any]:
        stats.add("recompiles_after_seal")
        frame = torch_compat.frame_being_compiled()
        code = None if frame is None else frame[0]
        name = "a graph" if code is None else code.co_name
        sentence = errors.recompile_after_seal(name, self._graphs_of_code.get(code, 0) if code is not None else 0)
        _warn(errors.RecompileAfterSeal(sentence), config.strict)
        return graph_module.forward

    def _count_graph(self, stats: Stats) -> tuple[str, int]:
        """Count a graph of the frame that Dynamo is compiling; the frame's name and the graph's number come back."""
        frame = torch_compat.frame_being_compiled()
        if frame is None:
            return "graph", 0
        code, values = frame
        owner = values.get("self", torch_compat.module_in_wrapper(code, values))
        name = type(owner).__name__ if isinstance(owner, torch.nn.Module) else code.co_name
        with self._lock:
            number = self._graphs_of_code.get(code, 0)
            self._graphs_of_code[code] = number + 1
        if number:
            stats.add("recompiles")
        return f"{name}#{number}", number


def _read_options(options: Mapping[str, object] | None) -> tuple[Config, Stage | None]:
    """The config, and the ``Stage`` among the options; where both say the same thing, they must agree."""
    stage = None
    if isinstance(options, Mapping):
        options = dict(options)
        stage = options.pop("stage", None)
    if stage is not None and not isinstance(stage, Stage):
        raise errors.ConfigError(errors.not_a_stage(stage))
    config = Config.resolve(options)
    if stage is None:
        return config, None
    if config.sources["max_tokens"] != "default" and config.max_tokens != stage.max_tokens:
        raise errors.ConfigError(errors.two_max_tokens(config.max_tokens, stage.max_tokens))
    if config.sources["stage_inputs"] != "default" and set(config.stage_inputs) != set(stage.inputs):
        raise errors.ConfigError(errors.two_stage_inputs(config.stage_inputs, list(stage.inputs)))
    return config, stage


def _tail_ranks(config: Config, stage: Stage | None) -> Mapping[str, int | None]:
    """Name of each stage input -> how many dimensions come after its tokens, if a ``Stage`` says so."""
    if stage is None:
        return dict.fromkeys(config.stage_inputs)
    return {name: len(proxy.shape) for name, proxy in stage.inputs.items()}


def _graph_kind(config: Config, table: InputTable) -> tuple[GraphKind | None, str]:
    """The device of the program's graphs; None, with the reason, where there are none."""
    if config.mode == "none" or config.graphs == "off":
        return None, "mode='none'" if config.mode == "none" else "graphs='off'"
    devices = [i.spec.device for i in table.inputs if i.spec is not None]
    on_cuda = any(device.type == "cuda" for device in devices)
    kind = config.graphs if config.graphs != "auto" else ("cuda" if on_cuda else "off")
    if kind == "off":
        return None, "graphs='auto' and no input is on a CUDA device"
    if kind == "cuda" and not on_cuda:
        where = ", ".join(sorted({str(device) for device in devices})) or "no device"
        return None, errors.graphs_on_other_device("cuda", where)
    return kind, ""


def _guard_sizes(split: Split, table: InputTable, is_first: bool) -> bool:
    """Have Dynamo guard that other sizes which compute pieces take equal the token count, if they seem to.

    Whoever marks each argument as dynamic gets a symbol for each. A call in which they differ is then one for another
    graph, in which they stay apart. Likewise strides that seem to be fixed, but only in the first graph of some code:
    where they do vary, each would get a graph of its own.
    """
    specs = [spec for piece in split.pieces if piece.kind == "compute" for spec in piece.input_specs]
    taken = {spec.symbol for spec in specs if isinstance(spec, SymbolSpec)}
    equal = [symbol for symbol in table.likely_equal if symbol in taken]
    strides = {symbol for spec in specs if isinstance(spec, TensorSpec) for symbol in symbols_of(spec.stride)}
    fixed = [symbol for symbol in table.likely_fixed if symbol in strides and is_first]
    sizes = torch_compat.placeholder_sizes(split.whole) if equal or fixed else {}
    held = [bool(sizes[symbol] == sizes[table.token_count]) for symbol in equal]
    held += [bool(sizes[symbol] == torch_compat.symbolic_hint(sizes[symbol])) for symbol in fixed if symbol in sizes]
    return bool(held) and all(held)


def _checked(stage: Stage, table: InputTable) -> Stage:
    for graph_input in table.of_kind("stage-input"):
        assert graph_input.spec is not None
        if (why := stage.check(graph_input.label, graph_input.spec, graph_input.token_dim)) is not None:
            raise errors.ConfigError(why)
    return stage


def _unsplit(
    name: str,
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    stage: Stage | None,
    why: errors.PPPiecewiseError,
) -> UnsplitProgram:
    """The program of a graph that goes to the stock backend whole; under ``strict``, ``why`` is raised."""
    needs_gradient = isinstance(why, errors.GradientFallback)
    if config.strict or needs_gradient:
        _warn(why, config.strict)
    _LOG.warning("%s is not split: %s", name, why)
    call = torch_compat.stock_backend(config.compiler)(graph_module, list(example_inputs))
    counter = "grad_fallbacks" if needs_gradient else None
    program = UnsplitProgram(name, call, config, str(why), counter, _explain, stage)
    program.stats.add("programs")
    return program


def _stats_of(stage: Stage | None) -> Stats:
    return TOTALS if stage is None else stage.stats


def _report_unmatched(
    config: Config, stage: Stage | None, matcher: SplitOpMatcher, table: InputTable, split: Split
) -> None:
    unmatched = [pattern for pattern in matcher.required if pattern not in split.cuts.matches]
    if unmatched:
        _stats_of(stage).add("unmatched_split_ops", len(unmatched))
        _warn(errors.UnmatchedName(errors.unmatched_split_ops(unmatched, split.cuts.attention_like)), config.strict)
    unmatched_inputs = table.unmatched_stage_inputs
    if stage is not None:  # between graph breaks each graph has some of them
        stage.matched_names.update(i.label for i in table.of_kind("stage-input"))
        unmatched_inputs = tuple(name for name in unmatched_inputs if name not in stage.matched_names)
    if unmatched_inputs and (stage is not None or config.sources["stage_inputs"] != "default"):
        candidates = [i.label for i in table.inputs if i.spec is not None and i.kind != "parameter"]
        sentence = errors.unmatched_stage_inputs(unmatched_inputs, candidates)
        _warn(errors.UnmatchedName(sentence), config.strict)


def _warn(problem: errors.PPPiecewiseError, strict: bool) -> None:
    """Warn of a problem; raise it under ``strict``."""
    if strict:
        raise problem
    warnings.warn(str(problem), errors.PPPiecewiseWarning, stacklevel=3)


def _log_program(program: Program) -> None:
    """One line about a program that was just built, so that a first call of many seconds does not look hung."""
    stats = program.stats.snapshot()
    graphs = "no graphs: " + program.graphs_off_reason
    if program.graphs is not None:
        graphs = f"graphs for buckets of {program.graphs.plan.ladder} tokens"
    _LOG.info(
        "%s: %d compute pieces (%d distinct), %d compiled in %.2f s, %d reused; %s",
        program.name,
        stats.pieces,
        len({piece.key for piece in program.split.pieces if piece.kind == "compute"}),
        stats.pieces_compiled,
        stats.compile_seconds,
        stats.pieces_reused,
        graphs,
    )


def _explain(program: AnyProgram) -> str:
    return explanation(describe(program))


backend = PiecewiseBackend()
"""The object behind ``backend="pp_piecewise"``."""

programs, explain, seal, unseal = backend.programs, backend.explain, backend.seal, backend.unseal


def graph_input_sources(graph: object) -> list[str] | None:
    """Where each input of a program lies, as expressions in the frame that Dynamo compiled; None for what is none."""
    if not any(program is graph for program in programs()):
        return None
    return [graph_input.source for graph_input in graph.inputs] if isinstance(graph, Program) else None


def warmed_up_tokens(stage: Stage) -> set[int]:
    """The buckets that the programs of a stage have captured, or dropped."""
    own = [program.graphs for program in backend.programs() if program.stage is stage]
    found = [({bucket.tokens for bucket, _ in graphs.buckets}, graphs.dropped) for graphs in own if graphs is not None]
    return {tokens for captured, dropped in found for tokens in (*captured, *dropped)}


def release_stage(stage: Stage) -> None:
    """Release what the programs of a stage hold, and the stage."""
    for program in backend.programs():
        if program.stage is stage:
            program.release()
    stage.release()


def reset() -> None:
    """Forget programs and compiled pieces, and zero the counters."""
    backend.reset()
    TOTALS.reset()


def warmup(
    compiled: Callable[..., Any],
    make_inputs: MakeInputs,
    sizes: Sequence[int] | None = None,
    progress: bool | None = None,
) -> None:
    """Compile and capture all that calls of ``compiled`` need, so that no later call compiles or captures.

    State that graphs write, proxies and random generators are afterwards as they were, but not what the module
    replaces, in attributes or caches. The calls run the module, so ``make_inputs`` should give inputs like those of
    serving, of the same kinds, made in the same grad or inference mode.

    Args:
        compiled: what ``torch.compile(module, backend="pp_piecewise")`` returned.
        make_inputs: number of tokens -> ``(args, kwargs)`` for the module.
        sizes: numbers of tokens to call with; by default whatever reaches every bucket of the options.
        progress: whether to show a bar, and then the seconds and bytes of each bucket and the bytes in all; by default
            on a terminal only. The log has that line in any case.

    Raises:
        PPPiecewiseError: no program ran, or state could not be kept for want of memory.
        ConfigError: ``make_inputs`` or ``sizes`` cannot be used.
    """

    def captured() -> dict[int, tuple[float, int]]:
        found: dict[int, tuple[float, int]] = {}
        for program in backend.programs():
            for bucket, _ in program.all_buckets:
                seconds, num_bytes = found.get(bucket.tokens, (0.0, 0))
                found[bucket.tokens] = (seconds + bucket.seconds, num_bytes + bucket.graph_bytes)
        return found

    if not warm_up(compiled, make_inputs, sizes, progress, captured):
        without = [program for program in backend.programs() if program.graphs is None]
        reasons = [p.graphs_off_reason if isinstance(p, Program) else p.reason for p in without]
        with_graphs = [p.graphs for p in backend.programs() if p.graphs is not None]
        reasons += [reason.sentence for graphs in with_graphs for reason in graphs.dropped.values()]
        warnings.warn(errors.nothing_captured(list(dict.fromkeys(reasons))), errors.PPPiecewiseWarning, stacklevel=2)
