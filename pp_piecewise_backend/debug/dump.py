"""What a person can read afterwards: one folder per rank and program, written as each step finishes.

Note [a dump never disturbs]
Nothing here changes what is compiled or run. Whatever goes wrong while writing is said once, and the process dumps
nothing more there. Each file appears whole or not at all (a temporary name, then ``os.replace``), so a reader
may come at any time; ``events.jsonl`` grows by whole lines. Folders are claimed by making them: what an earlier run, or
another process with the same rank, has written stays as it is, and this one writes next to it (``rank_0.2``).
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule

from .. import errors
from ..compilation.inductor import CompiledPiece
from ..compilation.placeholders import InputTable
from ..compilation.split import Piece, Split
from ..config import Config
from ..runtime.hooks import NO_EVENTS, Events
from ..runtime.program import Program, UnsplitProgram
from ..utils import torch_compat
from ..utils.counters import Stats
from ..utils.ranks import own_rank
from ..utils.reasons import Reason
from .describe import AnyProgram, begin, describe, describe_split, now, told
from .dynamo_frame import FrameWriter
from .explain import explain
from .piece_script import parent_text, piece_files, piece_script, step_text
from .report import report_page
from .summary import EVENTS, REPORT, SUMMARY

_LOG = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., None])

_MOST_INTEGERS = 2**20
"""Larger integer tensors are not read for their range."""
_MOST_MISS_EVENTS = 10_000
_REFRESH_SECONDS = 1.0
"""Least time between two rewritings that captures and misses ask for."""


class Dumps:
    """The dumps of this process: one folder of its rank per ``dump_dir``, one dump per program. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folders: dict[tuple[Path, int], _RankFolder] = {}
        self.unfinished: list[ProgramDump] = []
        """Those to which something may still happen."""

    def start(self, name: str, config: Config) -> Events:
        """The events of a new program: written down if ``dump_dir`` is set, dropped if not."""
        if config.dump_dir is None:
            return NO_EVENTS
        place = config.dump_dir, os.getpid()
        with self._lock:
            if place not in self._folders:
                self._folders[place] = _RankFolder(config.dump_dir)
            folder = self._folders[place]
            if folder.is_broken:
                return NO_EVENTS
            try:
                self.unfinished.append(ProgramDump(folder, name, config))
            except Exception as error:
                folder.give_up(error)
                return NO_EVENTS
            return self.unfinished[-1]

    def finish(self) -> None:
        """Bring all dumps up to date."""
        for program_dump in tuple(self.unfinished):
            if program_dump.path.is_dir():  # whoever has removed it wants it no more
                program_dump.refresh()

    def close(self) -> None:
        """Bring all dumps up to date for the last time; programs that live on write events only."""
        self.finish()
        with self._lock:
            self.unfinished.clear()


def trace_program(program: AnyProgram) -> None:
    """Show a program in torch's structured trace (``TORCH_TRACE``), if there is one."""
    try:
        torch_compat.trace_artifact("pp_piecewise_explain", lambda: explain(describe(program)))
        torch_compat.trace_artifact("pp_piecewise_summary", lambda: describe(program).model_dump_json(indent=1))
        if isinstance(program, Program):
            split, table = program.split, program.table
            torch_compat.trace_artifact("pp_piecewise_split", lambda: parent_text(program.name, split, table))
    except Exception:
        _LOG.warning("%s: torch's structured trace does not get it", program.name, exc_info=True)


# ------------------------------------------------------------------------------------- the folders


class _RankFolder:
    """The folder of this process in one ``dump_dir``, and whether writing there still works."""

    def __init__(self, dump_dir: Path) -> None:
        self.dump_dir = dump_dir
        self.path = dump_dir.absolute() / f"rank_{own_rank()}"
        self.is_broken = False
        self._lock = threading.Lock()
        wanted = self.path
        try:
            wanted.parent.mkdir(parents=True, exist_ok=True)
            self.path = _claim(wanted)
        except Exception as error:
            self.give_up(error)
        if self.path != wanted:
            _LOG.warning("%s", errors.dump_folder_taken(dump_dir / wanted.name, self.path))

    def give_up(self, error: Exception) -> None:
        """Say once why nothing more is written."""
        with self._lock:
            was_broken, self.is_broken = self.is_broken, True
        if not was_broken:
            _LOG.warning("%s", errors.dump_failed(self.dump_dir, error))
            _LOG.debug("the dump failed here", exc_info=error)


def _claim(wanted: Path) -> Path:
    """Make a folder that nobody else has made: the wanted one, or with ``.2`` and so on after its name."""
    path, number = wanted, 1
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
            path = wanted.with_name(f"{wanted.name}.{number}")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees a part of it."""
    temporary = path.with_name(f".{path.name}.tmp")  # nobody else writes in this folder
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
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
        self.folder = folder
        self.process_id = os.getpid()
        self.is_broken = False
        self.lock = threading.RLock()
        self.path = _claim(folder.path / re.sub(r"[^A-Za-z0-9_]+", "_", name))
        self.name = name
        self._began = time.perf_counter()
        self._summary = begin(name, config)
        self._program: weakref.ref[AnyProgram] | None = None
        self._stats: Stats | None = None
        self._compile_states: dict[int, str] = {}
        self._integer_ranges: dict[str, tuple[int, int]] = {}
        self._piece_texts: dict[str, str] = {}
        self._code_is_written: set[str] = set()
        """Keys of the pieces of which the generated code is there."""
        self._miss_events = 0
        self._misses_seen: set[tuple[Reason, int | None]] = set()
        self._refreshed_at = 0.0
        self._frame = FrameWriter(self._write)
        _LOG.info("dumping %s into %s", name, self.path)

    # ------------------------------------------------------------------------- events

    @_never_fails
    def traced(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> None:
        text = graph_module.print_readable(print_output=False, include_stride=True, include_device=True)
        heading = f"# {self.name} as Dynamo gave it: to be read, it makes no inputs\nimport torch\n\n\n"
        self._write("dynamo_graph.py", heading + text.strip("\n") + "\n")
        placeholders = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
        self._note_integers(dict(zip(placeholders, example_inputs, strict=False)))
        self._write_summary()
        self._event("traced", nodes=len(graph_module.graph.nodes), inputs=len(placeholders))
        _, _, number = self.name.partition("#")
        if number.isdigit() and int(number):
            self._event("recompiled", programs_before=int(number))

    @_never_fails
    def split(self, split: Split, table: InputTable) -> None:
        self._note_integers(split.constants)
        self._write("split_parent.py", parent_text(self.name, split, table))
        for piece, file in zip(split.pieces, piece_files(split.pieces), strict=True):
            if file not in self._piece_texts:
                self._piece_texts[file] = self._piece_text(piece)
                self._write(file, self._piece_texts[file])
        self._write_summary(progress="split", **describe_split(split, table, split.pieces))
        compute = [piece.key for piece in split.pieces if piece.kind == "compute"]
        self._event("split", pieces=len(compute), distinct_pieces=len(set(compute)),
                    eager_steps=len(split.pieces) - len(compute))  # fmt: skip

    @_never_fails
    def compiled(self, piece: Piece, compiled: CompiledPiece) -> None:
        self._compile_states[piece.index] = "compiled" if compiled.failure is None else "failed"
        self._write_code(piece, compiled)
        seconds = round(compiled.compile_seconds, 6)
        self._event("compiled", piece=piece.index, key=piece.key, compile_seconds=seconds, failure=compiled.failure)

    @_never_fails
    def reused(self, piece: Piece, compiled: CompiledPiece) -> None:
        self._compile_states[piece.index] = "reused" if compiled.failure is None else "failed"
        self._write_code(piece, compiled)
        self._event("reused", piece=piece.index, key=piece.key)

    @_never_fails
    def built(self, program: AnyProgram) -> None:
        self._program = weakref.ref(program)
        self._stats = program.stats
        if isinstance(program, UnsplitProgram):
            self._event("not split", reason=program.reason)
        else:
            self._event("built")
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
            self._event("missed", **told(reason), pieces=pieces, tokens=tokens, call=call)
        if (reason, tokens) in self._misses_seen:
            self._refresh_if_due()
        else:
            self._misses_seen.add((reason, tokens))
            self.refresh()

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
            self._summary = describe(program, self._compile_states, self._summary)
            self._write("explain.txt", explain(self._summary) + "\n")
        elif self._stats is not None:
            self._summary = self._summary.model_copy(update={"counters": self._stats.as_dict()})
        self._write_summary()
        self._write(REPORT, report_page(self._summary, self._piece_texts))
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

    def _write_code(self, piece: Piece, compiled: CompiledPiece) -> None:
        """Once for equal pieces: this program's first one may have been compiled for an earlier program."""
        if piece.key not in self._code_is_written and (code := torch_compat.generated_code(compiled.call)) is not None:
            self._write(f"piece_{piece.index:02d}_inductor.py", code)
            self._code_is_written.add(piece.key)

    def _write_summary(self, **known: Any) -> None:
        """Write what was known before and what is new in it."""
        known |= {"written_at": now(), "extras": self._frame.extras}
        self._summary = self._summary.model_copy(update=known)
        self._write(SUMMARY, self._summary.model_dump_json(indent=1) + "\n")

    def _write(self, name: str, text: str) -> None:
        write_whole(self.path / name, text)

    def _event(self, event: str, **details: Any) -> None:
        seconds = round(time.perf_counter() - self._began, 6)
        line = json.dumps({"event": event, "at": now(), "seconds": seconds, **details}) + "\n"
        with open(self.path / EVENTS, "ab", buffering=0) as file:  # one write, so that no reader sees half a line
            file.write(line.encode())

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
