"""What the backend and its programs report of what happens, for a dump to write down.

The methods of ``Events`` do nothing: they are what runs while dumping is off. ``dump.py`` has the other kind. None of
them may raise or change what it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .tracing import Timeline

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from ..compilation.inductor import CompiledPiece
    from ..compilation.placeholders import InputTable
    from ..compilation.split import Piece, Split
    from ..utils.reasons import Reason


class Events:
    """One program's events, in the order in which they come."""

    def traced(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> None:
        """Dynamo gave a graph; the tensors may be real or fake."""

    def split(self, split: Split, table: InputTable) -> None:
        """The graph was cut into pieces."""

    def compiled(self, piece: Piece, compiled: CompiledPiece) -> None:
        """A compute piece was compiled, or its compiler failed."""

    def reused(self, piece: Piece, compiled: CompiledPiece) -> None:
        """A compute piece was served by an earlier equal one."""

    def built(self, program: Any) -> None:
        """The program is complete, or the graph went to a stock backend whole."""

    def captured(self, tokens: int, pieces: int, graph_bytes: int, seconds: float) -> None:
        """Pieces of the program were captured for a bucket."""

    def missed(self, reason: Reason, pieces: int, tokens: int | None, call: int) -> None:
        """Compute pieces ran without their graph in a call although graphs are on."""

    def sealed(self) -> None:
        """From now on no new graph is compiled."""


NO_EVENTS = Events()
"""Writes nothing down."""


class StageListener(Protocol):
    """Who hands a stage's memory over, and so wants to know, within a call, when steps are done with it."""

    timeline: Timeline | None
    """Where the steps of calls are noted, if anywhere."""

    def landing_was_read(self) -> None:
        """Every step that reads landing memory was run (on a GPU: enqueued), and steps follow that do not."""

    def mark_landing_read(self) -> None:
        """The same, while a full graph is launched: what takes the host longer than a launch waits for the last one."""

    def results_are_written(self) -> None:
        """The next step writes memory in which results of earlier calls lie."""


Notice = Literal["mark_landing_read", "results_are_written"]
"""A method of ``StageListener`` that is called between two parts of a full graph."""
