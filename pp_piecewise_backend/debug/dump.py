"""What a person can read afterwards: one folder per rank and program, written as each step finishes.

Note [a dump never disturbs]
Nothing here changes what is compiled or run. Whatever goes wrong while writing is said once, and the process dumps
nothing more there. Each file appears whole or not at all (a temporary name, then ``os.replace``), so a reader
may come at any time; ``events.jsonl`` grows by whole lines. Folders are claimed by making them: what an earlier run, or
another process with the same rank, has written stays as it is, and this one writes next to it (``rank_0.2``).
"""

from __future__ import annotations

import atexit
import dis
import functools
import json
import logging
import os
import platform
import re
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from types import CodeType
from typing import Any, TypeAlias, TypeVar

import torch
from torch.fx import GraphModule

from .. import errors
from ..compilation.inductor import CompiledPiece, generated_files
from ..compilation.placeholders import GraphInput, InputTable
from ..compilation.specs import TensorSpec
from ..compilation.split import Piece, ResultValue, Split
from ..config import Config, rank_in_environment
from ..runtime.hooks import NO_EVENTS, Events
from ..runtime.ownership import find_boundary
from ..runtime.program import Program, UnsplitProgram
from ..utils import torch_compat
from ..utils.counters import Stats
from ..utils.reasons import Reason
from .explain import short_source
from .piece_script import parent_text, piece_script, source_text, step_text
from .report import report_page
from .summary import (
    EVENTS,
    REPORT,
    SUMMARY,
    BucketEntry,
    Extras,
    Graphs,
    InputEntry,
    MissEntry,
    OptionEntry,
    PieceEntry,
    Progress,
    Summary,
)

_LOG = logging.getLogger(__name__)

AnyProgram: TypeAlias = Program | UnsplitProgram
Method = TypeVar("Method", bound=Callable[..., None])

DYNAMO_GRAPH = "dynamo_graph.py"
SPLIT_PARENT = "split_parent.py"
EXPLANATION = "explain.txt"
GUARDS = "guards.txt"
TRANSFORMED_CODE = "transformed_code.py"

_PACKAGES = ("pp_piecewise_backend", "torch", "triton", "depyf", "transformers")
_MOST_INTEGERS = 2**20
"""Larger integer tensors are not read for their range."""
_MOST_MISS_EVENTS = 10_000
_MOST_INSTRUCTIONS = 3_000
"""depyf's time grows with the square of the number: 1 s at 1,500 [ran]."""
_REFRESH_SECONDS = 1.0
"""Least time between two rewritings that captures and misses ask for."""


def piece_file(piece: Piece) -> str:
    return f"piece_{piece.index:02d}_compute.py" if piece.kind == "compute" else f"piece_{piece.index:02d}_eager.txt"


def inductor_file(piece: Piece) -> str:
    return f"piece_{piece.index:02d}_inductor.py"


def start(name: str, config: Config) -> Events:
    """The events of a new program: written down if ``dump_dir`` is set, dropped if not."""
    if config.dump_dir is None:
        return NO_EVENTS
    with _LOCK:
        folder = _RANK_FOLDERS.setdefault((config.dump_dir, os.getpid()), _RankFolder(config.dump_dir))
    try:
        folder.open()
        if folder.is_broken:
            return NO_EVENTS
        program_dump = ProgramDump(folder, name, config)
    except Exception as error:
        folder.give_up(error)
        return NO_EVENTS
    with _LOCK:
        _DUMPS.append(program_dump)
    return program_dump


def finish() -> None:
    """Bring all dumps of this process up to date; also runs at exit."""
    with _LOCK:
        dumps = [program_dump for program_dump in _DUMPS if program_dump.process_id == os.getpid()]
    for program_dump in dumps:
        is_there = program_dump.path.is_dir()  # whoever has removed it wants it no more
        if is_there:
            program_dump.refresh()
        if program_dump.is_complete or not is_there:
            with _LOCK:
                _DUMPS.remove(program_dump)


def trace_program(program: AnyProgram) -> None:
    """Show a program in torch's structured trace (``TORCH_TRACE``), if there is one."""
    try:
        torch_compat.trace_artifact("pp_piecewise_explain", program.explain)
        torch_compat.trace_artifact("pp_piecewise_summary", lambda: describe(program).model_dump_json(indent=1))
        if isinstance(program, Program):
            split, table = program.split, program.table
            torch_compat.trace_artifact("pp_piecewise_split", lambda: _parent(program.name, split, table))
    except Exception:
        _LOG.warning("%s: torch's structured trace does not get it", program.name, exc_info=True)


# ------------------------------------------------------------------------------------- the folders


class _RankFolder:
    """The folder of this process in one ``dump_dir``, and whether writing there still works."""

    def __init__(self, dump_dir: Path) -> None:
        self.dump_dir = dump_dir
        self.rank = rank_in_environment()
        self.is_broken = False
        self.path: Path | None = None
        self._lock = threading.Lock()

    def open(self) -> None:
        with self._lock:
            if self.path is not None or self.is_broken:
                return
            wanted = f"rank_{self.rank}"
            self.dump_dir.mkdir(parents=True, exist_ok=True)
            self.path = _claim(self.dump_dir.absolute(), wanted)
            if self.path.name != wanted:
                _LOG.warning("%s", errors.dump_folder_taken(self.dump_dir / wanted, self.path))

    def give_up(self, error: Exception) -> None:
        """Say once why nothing more is written."""
        with self._lock:
            if self.is_broken:
                return
            self.is_broken = True
        _LOG.warning("%s", errors.dump_failed(self.dump_dir, error))
        _LOG.debug("the dump failed here", exc_info=error)


_LOCK = threading.Lock()
_RANK_FOLDERS: dict[tuple[Path, int], _RankFolder] = {}
_DUMPS: list[ProgramDump] = []


def _claim(parent: Path, name: str) -> Path:
    """Make a folder that nobody else has made: ``name``, or ``name.2`` and so on."""
    number = 1
    while True:
        path = parent / (name if number == 1 else f"{name}.{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees a part of it."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _never_fails(method: Method) -> Method:
    """See Note [a dump never disturbs]. A folder that fails ends all dumps in it, anything else this program's."""

    @functools.wraps(method)
    def guarded(self: ProgramDump, *args: Any, **kwargs: Any) -> None:
        if self.is_broken or self.folder.is_broken or self.process_id != os.getpid():
            return
        try:
            with self.lock:
                method(self, *args, **kwargs)
        except OSError as error:
            self.folder.give_up(error)
        except Exception as error:
            self.is_broken = True
            _LOG.warning("%s", errors.dump_incomplete(self.name, self.path, error), exc_info=error)

    return guarded  # type: ignore[return-value]


# --------------------------------------------------------------------------------------- one program


class ProgramDump(Events):
    """Writes the folder of one program. Keeps no program alive."""

    def __init__(self, folder: _RankFolder, name: str, config: Config) -> None:
        assert folder.path is not None
        self.folder = folder
        self.process_id = os.getpid()
        self.is_broken = False
        self.lock = threading.RLock()
        self.path = _claim(folder.path, re.sub(r"[^A-Za-z0-9_]+", "_", name))
        self.name = name
        self._began = time.perf_counter()
        self._summary = _begin(name, config)
        self._program: weakref.ref[AnyProgram] | None = None
        self._stats: Stats | None = None
        self._compile_states: dict[int, str] = {}
        self._integer_ranges: dict[str, tuple[int, int]] = {}
        self._generated_before: frozenset[str] = frozenset()
        self._miss_events = 0
        self._misses_seen: set[tuple[Reason, int | None]] = set()
        self._refreshed_at = 0.0
        self._frame = _FrameWriter(self.path)
        _LOG.info("dumping %s into %s", name, self.path)

    @property
    def is_complete(self) -> bool:
        """Whether nothing more can happen to the program: it is gone."""
        return self._program is not None and self._program() is None

    # ------------------------------------------------------------------------- events

    @_never_fails
    def traced(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> None:
        text = graph_module.print_readable(print_output=False, include_stride=True, include_device=True)
        self._write(DYNAMO_GRAPH, text.strip("\n") + "\n")
        placeholders = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
        self._note_integers(dict(zip(placeholders, example_inputs, strict=False)))
        self._generated_before = frozenset(generated_files())
        self._write_summary()
        self._event("traced", nodes=len(graph_module.graph.nodes), inputs=len(placeholders))
        _, _, number = self.name.partition("#")
        if number.isdigit() and int(number):
            self.recompiled(int(number))

    @_never_fails
    def split(self, split: Split, table: InputTable) -> None:
        self._note_integers(split.constants)
        files = _files(split.pieces)
        self._write(SPLIT_PARENT, _parent(self.name, split, table))
        for piece in split.pieces:
            if files[piece.index] != piece_file(piece):
                continue  # an equal piece has it
            self._write(piece_file(piece), self._piece_text(piece))
        self._summary = self._summary.model_copy(update={"progress": "split", **describe_split(split, table)})
        self._write_summary()
        compute = [piece.key for piece in split.pieces if piece.kind == "compute"]
        self._event("split", pieces=len(compute), distinct_pieces=len(set(compute)),
                    eager_steps=len(split.pieces) - len(compute))  # fmt: skip

    @_never_fails
    def compiled(self, piece: Piece, compiled: CompiledPiece) -> None:
        self._compile_states[piece.index] = "compiled" if compiled.failure is None else "failed"
        generated = [path for path in generated_files() if path not in self._generated_before]
        self._generated_before |= frozenset(generated)
        # A cache that somebody has cleared meanwhile is no reason to stop.
        texts = [Path(path).read_text() for path in generated if Path(path).is_file()]
        if texts:
            self._write(inductor_file(piece), "\n\n".join(texts))
        more = {} if compiled.failure is None else {"failure": compiled.failure}
        self._event(
            "compiled", piece=piece.index, key=piece.key, compile_seconds=round(compiled.compile_seconds, 6), **more
        )

    @_never_fails
    def reused(self, piece: Piece, compiled: CompiledPiece) -> None:
        self._compile_states[piece.index] = "reused" if compiled.failure is None else "failed"
        self._event("reused", piece=piece.index, key=piece.key)

    @_never_fails
    def built(self, program: AnyProgram) -> None:
        self._program = weakref.ref(program)
        self._stats = program.stats
        if isinstance(program, UnsplitProgram):
            self._event("not split", reason=program.reason)
        else:
            self._event("built")
        self._summary = self._summary.model_copy(update={"progress": _progress(program)})
        self.refresh()

    @_never_fails
    def captured(self, tokens: int, pieces: int, graph_bytes: int, seconds: float) -> None:
        self._event(
            "captured", tokens=tokens, pieces=pieces, graph_bytes=graph_bytes, capture_seconds=round(seconds, 6)
        )
        self._refresh_if_due()

    @_never_fails
    def missed(self, reason: Reason, pieces: int, tokens: int | None, call: int) -> None:
        if self._miss_events < _MOST_MISS_EVENTS:
            self._miss_events += 1
            told = {"reason": reason.code, "sentence": reason.sentence}
            self._event("missed", **told, pieces=pieces, tokens=tokens, call=call)
        is_new = (reason, tokens) not in self._misses_seen
        self._misses_seen.add((reason, tokens))
        if is_new:
            self.refresh()
        else:
            self._refresh_if_due()

    @_never_fails
    def recompiled(self, programs_before: int) -> None:
        self._event("recompiled", programs_before=programs_before)

    @_never_fails
    def sealed(self) -> None:
        self._event("sealed")
        self.refresh()

    # ------------------------------------------------------------------------ writing

    @_never_fails
    def refresh(self) -> None:
        """Write what the program says of itself by now; of a dead one, what it last said and its final counters."""
        self._frame.write_guards()
        program = None if self._program is None else self._program()
        if program is not None:
            described = describe(program, self._compile_states, self._summary)
            self._summary = described
            self._write(EXPLANATION, described.explanation + "\n")
        elif self._stats is not None:
            self._summary = self._summary.model_copy(update={"counters": self._stats.as_dict()})
        self._write_summary()
        self._write(REPORT, report_page(self._summary, self._texts()))
        self._refreshed_at = time.perf_counter()

    def _refresh_if_due(self) -> None:
        if time.perf_counter() - self._refreshed_at > _REFRESH_SECONDS:
            self.refresh()

    def _piece_text(self, piece: Piece) -> str:
        try:
            if piece.kind == "eager":
                return step_text(piece, self.name)
            return piece_script(piece, self.name, self._integer_ranges)
        except Exception as error:  # one piece that cannot be printed must not cost the rest of the dump
            _LOG.debug("%s piece[%d] cannot be written down", self.name, piece.index, exc_info=error)
            return f"print({errors.piece_not_written(self.name, piece.index, error)!r})\n"

    def _write_summary(self) -> None:
        self._summary = self._summary.model_copy(update={"written_at": _now(), "extras": self._frame.outcome()})
        self._write(SUMMARY, self._summary.model_dump_json(indent=1) + "\n")

    def _write(self, name: str, text: str) -> None:
        write_whole(self.path / name, text)

    def _event(self, event: str, **details: Any) -> None:
        seconds = round(time.perf_counter() - self._began, 6)
        line = json.dumps({"event": event, "at": _now(), "seconds": seconds, **details}) + "\n"
        descriptor = os.open(self.path / EVENTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())  # one call, so that no reader sees half a line
        finally:
            os.close(descriptor)

    def _texts(self) -> dict[str, str]:
        """What the report unfolds: the text of each distinct piece, by file name."""
        names = dict.fromkeys(piece.file for piece in self._summary.pieces)
        return {name: (self.path / name).read_text() for name in names}

    def _note_integers(self, values: Mapping[str, object]) -> None:
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and _is_readable(value):
                self._integer_ranges[name] = (int(value.min()), int(value.max()))


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether it is a real tensor of integers, small enough to look through. Subclasses may answer with collectives."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
        return False
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        return False
    return 0 < tensor.numel() <= _MOST_INTEGERS


# ------------------------------------------------------------------------------------ describing


def describe(
    program: AnyProgram, compile_states: Mapping[int, str] | None = None, base: Summary | None = None
) -> Summary:
    """Everything that a program says of itself.

    Args:
        compile_states: "compiled", "reused" or "failed" by piece index, where it is known.
        base: gives what is not the program's to say; made here without one.
    """
    told: dict[str, Any] = {
        "progress": _progress(program),
        "counters": program.stats.as_dict(),
        "explanation": program.explain(),
        "graphs": describe_graphs(program),
    }
    if isinstance(program, UnsplitProgram):
        told["not_split"] = program.reason
    else:
        told |= describe_split(program.split, program.table)
        seconds = program.step_seconds
        told["pieces"] = [
            entry.model_copy(
                update=_describe_compiled(compiled, (compile_states or {}).get(entry.index))
                | {"plain_run": program.plain_runs.get(entry.index), "step_seconds": seconds.get(entry.index)}
            )
            for entry, compiled in zip(told["pieces"], program.compiled, strict=True)
        ]
        told["whole_plain_run"] = program.whole_plain_run
    return (base or _begin(program.name, program.config)).model_copy(update=told)


def _begin(name: str, config: Config) -> Summary:
    """What is known before anything has happened to the graph."""
    return Summary(
        progress="traced",
        name=name,
        rank=rank_in_environment(),
        process_id=os.getpid(),
        written_at=_now(),
        versions=versions(),
        config=[
            OptionEntry(option=row.name, environment=row.environment_name, value=row.value, source=row.source)
            for row in config.table()
        ],
    )


def _progress(program: AnyProgram) -> Progress:
    return "not split" if isinstance(program, UnsplitProgram) else "built"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def describe_split(split: Split, table: InputTable) -> dict[str, Any]:
    """The fields of a ``Summary`` that are known once the graph is cut."""
    files = _files(split.pieces)
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
        "pieces": [_describe_piece(piece, file) for piece, file in zip(split.pieces, files, strict=True)],
    }


def describe_graphs(program: AnyProgram) -> Graphs:
    """What the program captured and missed, as its ``describe_graphs()`` says."""
    ask = getattr(program, "describe_graphs", None)
    told: Mapping[str, Any] = {"mode": "none"} if ask is None else ask()
    return Graphs(
        mode=str(told["mode"]),
        buckets=[BucketEntry.model_validate(bucket) for bucket in told.get("buckets", ())],
        misses=[MissEntry.model_validate(miss) for miss in told.get("misses", ())],
        addresses=list(told.get("addresses", ())),
    )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "torch": torch.__version__}


def _describe_input(graph_input: GraphInput) -> InputEntry:
    spec = graph_input.spec
    return InputEntry(
        name=graph_input.name,
        source=short_source(graph_input.source),
        label=graph_input.label,
        kind=graph_input.kind,
        reason=graph_input.reason,
        type=str(graph_input.expression if spec is None else spec),
        stride=None if spec is None else [str(step) for step in spec.stride],
        device=None if spec is None else str(spec.device),
        storage=None if spec is None else spec.storage,
        token_dim=graph_input.token_dim,
    )


def _describe_piece(piece: Piece, file: str) -> PieceEntry:
    return PieceEntry(
        index=piece.index,
        kind=piece.kind,
        ops=list(piece.ops),
        reason=piece.reason,
        key=piece.key,
        file=file,
        inputs=[source_text(source) for source in piece.inputs],
        input_types=[_type_text(spec) for spec in piece.input_specs],
        outputs=list(piece.outputs),
        output_types=[_type_text(spec) for spec in piece.output_specs],
        reads_stage_inputs=list(piece.reads_stage_inputs),
        writes_stage_outputs=piece.writes_stage_outputs,
        padding=piece.padding,
    )


def _describe_compiled(compiled: CompiledPiece | None, state: str | None) -> dict[str, Any]:
    if compiled is None:
        return {}
    return {
        "compiled": state or ("compiled" if compiled.failure is None else "failed"),
        "compile_seconds": round(compiled.compile_seconds, 6),
        "failure": compiled.failure,
        "conditions": [str(condition) for condition in compiled.conditions],
    }


def _type_text(spec: object) -> str:
    if isinstance(spec, TensorSpec):
        return f"{spec} stride [{', '.join(map(str, spec.stride))}]"
    return "number" if spec is None else str(spec)


def _files(pieces: Sequence[Piece]) -> list[str]:
    """Per piece the file of the first one with its key."""
    first: dict[tuple[str, str], str] = {}
    return [first.setdefault((piece.kind, piece.key), piece_file(piece)) for piece in pieces]


def _parent(name: str, split: Split, table: InputTable) -> str:
    results = ", ".join(r.value if isinstance(r, ResultValue) else repr(r) for r in split.results)
    inputs = [graph_input.name for graph_input in table.inputs]
    return parent_text(name, inputs, split.pieces, _files(split.pieces), f"({results},)")


# ------------------------------------------------------------------------ what Dynamo made of the frame


class _FrameWriter:
    """Writes what Dynamo made of the frame: its bytecode as depyf decompiles it, and its guards.

    depyf is asked for text only. ``depyf.prepare_debug`` would patch torch and run its own decompiled code instead.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[str] = []
        self._problems: list[str] = []
        frame = torch_compat.frame_being_compiled()
        self._code: CodeType | None = None if frame is None else frame[0]
        # Dynamo lets go of a program once nobody holds the code that calls it.
        self._transformed: weakref.ref[CodeType] | None = None
        if self._code is not None:
            torch_compat.when_bytecode_is_ready(self._code, self._write_bytecode)

    def outcome(self) -> Extras:
        return Extras(files=list(self._files), problems=list(self._problems))

    def write_guards(self) -> None:
        """Dynamo has them once it is done with the frame, and drops them at its reset."""
        transformed = None if self._transformed is None else self._transformed()
        if self._code is None or transformed is None or GUARDS in self._files:
            return
        guards = torch_compat.guards_of(self._code, transformed)
        if guards is not None:
            write_whole(self._folder / GUARDS, _flat(guards))
            self._files.append(GUARDS)

    def _write_bytecode(self, transformed: CodeType) -> None:
        self._transformed = weakref.ref(transformed)
        try:
            write_whole(self._folder / TRANSFORMED_CODE, decompile(transformed))
            self._files.append(TRANSFORMED_CODE)
        except Exception as error:
            self._problems.append(errors.depyf_failed(TRANSFORMED_CODE, error))


def _flat(guards: str) -> str:
    """One line per guard, without the tree of objects that they hang on and where they come from."""
    lines = (re.sub(r"^[| ]*\+- |\s+# .*", "", line) for line in guards.splitlines() if "GuardManager: " not in line)
    return "\n".join(line for line in lines if line.strip()) + "\n"


def decompile(code: CodeType) -> str:
    """Python source with the meaning of the bytecode that Dynamo runs in place of the frame's."""
    import depyf

    count = sum(1 for _ in dis.get_instructions(code))
    if count > _MOST_INSTRUCTIONS:
        raise ValueError(errors.too_long_to_decompile(count, _MOST_INSTRUCTIONS))
    # depyf keeps what it is given for good, and Dynamo keeps a program as long as the code that calls it lives [ran].
    return depyf.decompile(code.replace())


atexit.register(finish)
