"""The entry point: ``torch.compile(model, backend="pp_piecewise")``. Start reading here."""

from __future__ import annotations

import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch.fx import GraphModule

from . import _compat, dump, errors
from .config import Config
from .events import Events
from .explanation import explain_all
from .facts import collect_facts
from .inductor import CompiledPiece, PieceCompiler, compile_whole
from .placeholders import InputTable, classify_inputs
from .program import Program, UnsplitProgram
from .split import Split, split_graph
from .split_ops import SplitOpMatcher
from .stats import TOTALS

_LOG = logging.getLogger(__name__)

AnyProgram = Program | UnsplitProgram


class PiecewiseBackend:
    """What Dynamo calls with each graph. One per process; threads may call it at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compiler = PieceCompiler()
        self._programs: list[weakref.ref[AnyProgram]] = []
        self._dynamo_before = (0, 0)
        self._graphs_of_code: weakref.WeakKeyDictionary[CodeType, int] = weakref.WeakKeyDictionary()

    def __call__(
        self,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        *,
        options: Mapping[str, object] | None = None,
        mode: str | None = None,
        **unknown: object,
    ) -> Callable[..., Any]:
        """Build the program for one graph. Dynamo calls it; see README for the options.

        Raises:
            ConfigError: an option or environment variable is wrong.
            UnmatchedName, GradientFallback: under ``strict``.
        """
        if mode is not None:
            raise errors.ConfigError(errors.unsupported_mode_keyword(mode))
        if unknown:
            raise errors.ConfigError(errors.unsupported_keywords(sorted(unknown)))
        config = Config.resolve(options)
        if not config.enabled:
            return compile_whole(graph_module, example_inputs, "inductor")
        name = self._count_graph()
        events = dump.start(name, config)
        events.traced(graph_module, example_inputs)
        matcher = SplitOpMatcher.from_config(config.split_ops)
        try:
            facts = collect_facts(graph_module, example_inputs)
            table = classify_inputs(facts, config.stage_inputs)
            split = None if facts.needs_gradient else split_graph(facts, table, matcher)
        except errors.SplitError as error:
            return _told(events, self._unsplit(name, graph_module, example_inputs, config, str(error)))
        except Exception as error:
            # A graph that we do not understand must still run; the traceback is for the report of the bug.
            _LOG.error("%s: internal error while splitting", name, exc_info=True)
            reason = errors.internal_error(error)
            return _told(events, self._unsplit(name, graph_module, example_inputs, config, reason))
        if split is None:
            needs = facts.needs_gradient
            return _told(events, self._fall_back_for_gradients(name, graph_module, example_inputs, config, needs))
        events.split(split, table)
        self._report_unmatched(config, matcher, table, split)
        return self._register(_told(events, self._build(name, split, table, config, events)))

    def reset(self) -> None:
        """Forget programs and compiled pieces. ``torch._dynamo.reset()`` calls it too."""
        dump.finish()
        with self._lock:
            for program in self._live():
                program.release()
            self._programs.clear()
            self._graphs_of_code.clear()
            self._compiler.reset()
            # Dynamo's own counters outlive its reset.
            self._dynamo_before = (_compat.recompile_limit_hits(), _compat.graph_breaks())

    def programs(self) -> tuple[AnyProgram, ...]:
        """The live programs, oldest first."""
        with self._lock:
            return tuple(self._live())

    def explain(self) -> str:
        """What was split where and why, for every live program."""
        given_up, breaks = self._dynamo_before
        return explain_all(
            [program.explain() for program in self.programs()],
            frames_given_up=_compat.recompile_limit_hits() - given_up,
            graph_breaks=_compat.graph_breaks() - breaks,
        )

    # ------------------------------------------------------------------------ building

    def _build(self, name: str, split: Split, table: InputTable, config: Config, events: Events) -> Program:
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
        program = Program(name, split, table, compiled, config)
        program.stats.add_many(
            {
                "programs": 1,
                "pieces": len(reused),
                "pieces_compiled": reused.count(False),
                "pieces_reused": reused.count(True),
                "compile_seconds": time.perf_counter() - started,
            }
        )
        return program

    def _unsplit(
        self, name: str, graph_module: GraphModule, example_inputs: Sequence[Any], config: Config, reason: str,
        counter: str | None = None,
    ) -> UnsplitProgram:  # fmt: skip
        if config.strict:
            raise errors.SplitError(reason)
        _LOG.warning("%s is not split: %s", name, reason)
        call = compile_whole(graph_module, example_inputs, config.compiler)
        program = UnsplitProgram(name, call, config, reason, counter)
        program.stats.add("programs")
        return self._register(program)

    def _fall_back_for_gradients(
        self, name: str, graph_module: GraphModule, example_inputs: Sequence[Any], config: Config, names: Sequence[str]
    ) -> UnsplitProgram:
        sentence = errors.gradient_fallback(names, config.compiler)
        if config.strict:
            raise errors.GradientFallback(sentence)
        warnings.warn(sentence, errors.PPPiecewiseWarning, stacklevel=2)
        return self._unsplit(name, graph_module, example_inputs, config, sentence, counter="grad_fallbacks")

    def _report_unmatched(self, config: Config, matcher: SplitOpMatcher, table: InputTable, split: Split) -> None:
        sentences = []
        unmatched = [pattern for pattern in matcher.required if pattern not in split.cuts.matches]
        if unmatched:
            TOTALS.add("unmatched_split_ops", len(unmatched))
            sentences.append(errors.unmatched_split_ops(unmatched, split.cuts.attention_like))
        if table.unmatched_stage_inputs and config.sources["stage_inputs"] != "default":
            candidates = [i.label for i in table.inputs if i.spec is not None and i.kind != "parameter"]
            sentences.append(errors.unmatched_stage_inputs(table.unmatched_stage_inputs, candidates))
        for sentence in sentences:
            if config.strict:
                raise errors.UnmatchedName(sentence)
            warnings.warn(sentence, errors.PPPiecewiseWarning, stacklevel=2)

    # ----------------------------------------------------------------------- registry

    def _count_graph(self) -> str:
        """Count a graph of the frame that Dynamo is compiling; the frame's name and the graph's number come back."""
        frame = _compat.frame_being_compiled()
        if frame is None:
            return "graph"
        code, values = frame
        owner = values.get("self")
        name = type(owner).__name__ if isinstance(owner, torch.nn.Module) else code.co_name
        with self._lock:
            number = self._graphs_of_code.get(code, 0)
            self._graphs_of_code[code] = number + 1
        if number:
            TOTALS.add("recompiles")
        return f"{name}#{number}"

    def _register(self, program: Any) -> Any:
        with self._lock:
            self._programs.append(weakref.ref(program))
        return program

    def _live(self) -> list[AnyProgram]:
        self._programs = [reference for reference in self._programs if reference() is not None]
        return [program for reference in self._programs if (program := reference()) is not None]


def _told(events: Events, program: Any) -> Any:
    """The finished program, after whoever writes things down has heard of it."""
    events.built(program)
    dump.trace_program(program)
    return program


backend = PiecewiseBackend()
"""The object behind ``backend="pp_piecewise"``."""


def programs() -> tuple[AnyProgram, ...]:
    """The live programs of this process, oldest first."""
    return backend.programs()


def explain() -> str:
    """What was split where and why, for every live program of this process."""
    return backend.explain()


def reset() -> None:
    """Forget programs and compiled pieces, and zero the counters."""
    backend.reset()
    TOTALS.reset()
