"""The only description of a program: a ``Summary``, which explain, report, inspect and dumps render.

It may be made while another thread runs the program; then counters and graphs may be a call apart.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, TypeAlias

from ..compilation.placeholders import GraphInput, InputTable
from ..compilation.specs import TensorSpec
from ..compilation.split import Piece, Split
from ..config import Config
from ..runtime.dispatch import Graphs as Captured
from ..runtime.ownership import find_boundary
from ..runtime.program import FullGraphs as FullSide
from ..runtime.program import Program, UnsplitProgram
from ..utils.ranks import own_rank
from ..utils.reasons import Reason
from ..utils.versions import versions
from .piece_script import piece_files, source_text
from .summary import (
    BucketEntry,
    DroppedEntry,
    FullGraphs,
    Graphs,
    InputEntry,
    MissEntry,
    NeverCapturedEntry,
    OptionEntry,
    PieceEntry,
    Summary,
)

AnyProgram: TypeAlias = Program | UnsplitProgram

_WHY_BY_DEFAULT = "every op is known to read nothing but its arguments; without warmup() there are none"
"""See Note [full graphs by default]."""


def describe(
    program: AnyProgram, compile_states: Mapping[int, str] | None = None, base: Summary | None = None
) -> Summary:
    """Everything that a program says of itself.

    Args:
        compile_states: "compiled", "reused" or "failed" by piece index, where it is known.
        base: gives what is not the program's to say; made here without one.
    """
    described: dict[str, Any] = {"counters": program.stats.as_dict(), "graphs": describe_graphs(program)}
    described["links"] = [] if program.stage is None else list(program.stage.links)
    described["entrance"] = "" if program.stage is None else program.stage.entrance()
    if isinstance(program, UnsplitProgram):
        described |= {"progress": "not split", "not_split": program.reason}
    else:
        described |= describe_split(program.split, program.table, program.pieces)
        described |= {
            "progress": "built",
            "whole_plain_run": program.whole_plain_run,
            "pieces": _describe_runs(program, described["pieces"], compile_states or {}),
        }
    return (base or begin(program.name, program.config)).model_copy(update=described)


def begin(name: str, config: Config) -> Summary:
    """What is known before anything has happened to the graph."""
    return Summary(
        progress="traced",
        name=name,
        rank=own_rank(),
        process_id=os.getpid(),
        written_at=now(),
        versions=versions(),
        settings=repr(config),
        config=[
            OptionEntry(option=row.name, environment=row.environment_name, value=row.value, source=row.source)
            for row in config.table()
        ],
    )


def describe_split(split: Split, table: InputTable, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The fields of a ``Summary`` that are known once the graph is cut."""
    boundary = find_boundary(split, table)
    return {
        "token_count": None if table.token_count is None else str(table.token_count),
        "token_reason": table.token_reason,
        "unmatched_stage_inputs": list(table.unmatched_stage_inputs),
        "split_matches": dict(split.cuts.matches),
        "attention_like": list(split.cuts.attention_like),
        "landing_free_behind": boundary.last_reader,
        "results_written_from": boundary.first_writer,
        "inputs": [_describe_input(graph_input) for graph_input in table.inputs],
        "pieces": [_describe_piece(piece, file) for piece, file in zip(pieces, piece_files(pieces), strict=True)],
    }


def describe_graphs(program: AnyProgram) -> Graphs:
    """What is captured and what missed."""
    if isinstance(program, UnsplitProgram):
        return Graphs(mode="none")
    graphs = program.graphs
    if graphs is None:
        return Graphs(mode="off", reason=program.graphs_off_reason)
    plan = graphs.plan
    return Graphs(
        mode=f"{plan.config.mode}, {plan.kind}",
        ladder=str(plan.ladder),
        has_one_size=plan.token_symbol is None,
        full=None if program.full is None else _describe_full(program.full),
        **_describe_captures(graphs),
        never_captured=[NeverCapturedEntry(piece=step, **told(reason)) for step, reason in plan.obstacles.items()],
        addresses=[
            {"input": plan.inputs[at].label if at < len(plan.inputs) else "constant", "arrival": arrival}
            for at, arrival in plan.arrivals.items()
        ],
    )


def _describe_captures(graphs: Captured) -> dict[str, Any]:
    return {
        "buckets": [
            BucketEntry(
                tokens=bucket.tokens,
                bytes=bucket.graph_bytes,
                seconds=bucket.seconds,
                pieces=len(bucket.graphs),
                comparisons_left=0 if bucket.proofs is None else bucket.proofs.left,
                replay_us=measured.replay_us if (measured := graphs.measured.get(bucket.tokens)) else None,
                otherwise_us=measured.otherwise_us if measured else None,
                not_captured={step: reason.sentence for step, reason in bucket.obstacles.items()},
            )
            for bucket, _ in graphs.buckets
        ],
        "dropped": [DroppedEntry(tokens=tokens, **told(reason)) for tokens, reason in graphs.dropped.items()],
        "misses": [
            MissEntry(**told(reason), tokens=tokens, pieces=missed.pieces, calls=missed.calls, call=missed.last_call)
            for (reason, tokens), missed in list(graphs.miss_log.items())
        ],
    }


def _describe_full(full: FullSide) -> FullGraphs:
    if full.graphs is None:
        return FullGraphs(max_tokens=full.max_tokens, why_not=full.why_not)
    (step,) = full.graphs.plan.capturable
    padding, captures = full.graphs.padding_of(step), _describe_captures(full.graphs)
    why = _WHY_BY_DEFAULT if full.graphs.gives_way else ""
    notices: list[str] = [*sorted(full.graphs.plan.instructions[step].notices)]
    return FullGraphs(max_tokens=full.max_tokens, why=why, padding=padding, notices=notices, **captures)


def told(reason: Reason) -> dict[str, str]:
    """A reason as the fields of an entry or event."""
    return {"reason": reason.code, "sentence": reason.sentence}


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _describe_input(graph_input: GraphInput) -> InputEntry:
    spec = graph_input.spec
    described: dict[str, Any] = {
        "source": graph_input.readable,
        "type": str(graph_input.expression if spec is None else spec),
    }
    if spec is not None:
        stride = [str(step) for step in spec.stride]
        described |= {"stride": stride, "device": str(spec.device), "storage": spec.storage}
    return InputEntry.model_validate(vars(graph_input) | described)


def _describe_piece(piece: Piece, file: str) -> PieceEntry:
    """What an entry has of the name that a piece has is the piece's."""
    types = {
        "input_types": [_type_text(spec) for spec in piece.input_specs],
        "output_types": [_type_text(spec) for spec in piece.output_specs],
    }
    inputs = [source_text(source) for source in piece.inputs]
    return PieceEntry.model_validate(vars(piece) | {"file": file, "inputs": inputs, **types})


def _describe_runs(program: Program, entries: Sequence[PieceEntry], states: Mapping[int, str]) -> list[PieceEntry]:
    """The entries with how their pieces were compiled and have run."""
    seconds, runs = program.step_seconds, []
    for entry, compiled in zip(entries, program.compiled, strict=True):
        update: dict[str, Any] = {
            "plain_run": program.plain_runs.get(entry.index),
            "step_seconds": seconds.get(entry.index),
        }
        if compiled is not None:
            update |= {
                "compiled": states.get(entry.index, "compiled" if compiled.failure is None else "failed"),
                "compile_seconds": round(compiled.compile_seconds, 6),
                "failure": compiled.failure,
                "conditions": [str(condition) for condition in compiled.conditions],
            }
        runs.append(entry.model_copy(update=update))
    return runs


def _type_text(spec: object) -> str:
    if isinstance(spec, TensorSpec):
        return f"{spec} stride [{', '.join(map(str, spec.stride))}]"
    return "number" if spec is None else str(spec)
