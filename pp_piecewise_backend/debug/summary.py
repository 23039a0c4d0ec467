"""The schema of ``summary.json``: everything that a dump says about one program, as plain data.

The field descriptions are the documentation; ``python -m pp_piecewise_backend inspect --schema`` prints them as a JSON
schema. Reading one validates it and builds nothing but these classes.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

SUMMARY = "summary.json"
EVENTS = "events.jsonl"
REPORT = "report.html"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class OptionEntry(_Entry):
    option: str
    environment: str = Field(description="The environment variable of the option.")
    value: str = Field(description="The value in effect, in its text form.")
    source: Literal["option", "environment", "default"]


class InputEntry(_Entry):
    """One input of the graph, in the order in which the program is called with them."""

    name: str = Field(description="Name of the placeholder.")
    source: str = Field(description="Where Dynamo takes it from, shortened: 'self.layers.0.weight'.")
    label: str = Field(description="Last component of the source: the name of the argument, entry or attribute.")
    kind: str = Field(description="token-count, stage-input, per-token, parameter, state, other-tensor or scalar.")
    reason: str = Field(description="How the kind is known.")
    type: str = Field(description="'float32[s0, 64]' for a tensor, the symbol or value of a number.")
    stride: list[str] | None = Field(default=None, description="Strides of a tensor, in elements.")
    device: str | None = None
    storage: int | None = Field(default=None, description="Equal numbers share memory.")
    token_dim: int | None = Field(default=None, description="The dimension that counts tokens.")


class PieceEntry(_Entry):
    """One step of the program, in the order in which the steps run."""

    index: int
    kind: Literal["compute", "eager"]
    ops: list[str] = Field(description="Names of its ops, in order.")
    reason: str = Field(description="Why it is a step of its own.")
    key: str = Field(description="Equal for pieces with equal meaning, which share one compilation.")
    file: str = Field(description="The file of the first piece with this key.")
    inputs: list[str] = Field(description="What it is called with: names of values, or 'x.size(0)'.")
    input_types: list[str]
    outputs: list[str]
    output_types: list[str]
    reads_stage_inputs: list[str] = Field(description="The proxies whose memory it takes.")
    writes_stage_outputs: bool = Field(description="Whether a result of the graph lies in memory that it makes.")
    padding: str = Field(description="'safe' if it may run on padded rows, or why not.")
    compiled: Literal["compiled", "reused", "failed"] | None = Field(
        default=None, description="None for eager steps; 'reused' if an earlier equal piece had been compiled."
    )
    compile_seconds: float | None = None
    failure: str | None = Field(default=None, description="Why the compiler gave up; the piece then runs as plain FX.")
    conditions: list[str] = Field(
        default=[], description="What the compiled code relies on about its sizes s0, s1, ..."
    )
    plain_run: str | None = Field(default=None, description="Why it ran as plain FX at least once, if it did.")
    step_seconds: float | None = Field(
        default=None, description="Time it took when the largest bucket was captured, if one was."
    )


class BucketEntry(_Entry):
    tokens: int
    bytes: int = Field(description="Graph memory that the bucket holds.")
    seconds: float = Field(description="Time that its capture took.")
    pieces: int = Field(description="Number of pieces captured.")
    comparisons_left: int = Field(
        default=0, description="Calls, under other contexts, in which a full graph is still to be compared."
    )
    replay_us: float | None = Field(
        default=None, description="Median of calls that fill it, if keep is if_faster and warmup() measured it."
    )
    otherwise_us: float | None = Field(default=None, description="The same without its graphs.")
    not_captured: dict[int, str] = Field(
        default={}, description="Piece -> why it could not be captured in this bucket."
    )


class _ReasonEntry(_Entry):
    reason: str = Field(description="The code that miss_reasons counts by.")
    sentence: str = Field(description="The same for a person, with what to do.")


class DroppedEntry(_ReasonEntry):
    """A bucket that is captured no more."""

    tokens: int


class NeverCapturedEntry(_ReasonEntry):
    """A compute piece that no graph can hold, whatever the bucket."""

    piece: int = Field(description="Its index.")


class MissEntry(_ReasonEntry):
    """Compute pieces that ran without their graph although graphs are on."""

    pieces: int = Field(description="How many compute pieces.")
    tokens: int | None = Field(default=None, description="Number of tokens of the call, if anything says it.")
    calls: int = Field(default=1, description="How many calls.")
    call: int | None = Field(
        default=None, description="Which call of the program was the last of them; the first is 1."
    )


class FullGraphs(_Entry):
    """Graphs of all pieces at once, next to those of the pieces."""

    max_tokens: int = Field(description="Larger calls replay the pieces.")
    why: str = Field(default="", description="Why there are some, where nobody asked for them.")
    why_not: str = Field(default="", description="Why there is none at any size, if so.")
    padding: str = Field(default="", description="'safe' if one may run on padded rows, or why not.")
    notices: list[str] = Field(
        default=[],
        description="Methods of the listener of the stage that are called between the parts that it is launched in.",
    )
    buckets: list[BucketEntry] = []
    dropped: list[DroppedEntry] = Field(default=[], description="Sizes that are captured no more.")
    misses: list[MissEntry] = Field(default=[], description="Calls that went on to the pieces.")


class Graphs(_Entry):
    mode: str = Field(
        description="'piecewise, cuda' or alike, 'off', or 'none' for a graph that was not built or not split."
    )
    reason: str = Field(default="", description="Why there are no graphs, if there are none.")
    ladder: str = Field(default="", description="The buckets, in tokens.")
    has_one_size: bool = Field(default=False, description="Whether the graph has a static token count.")
    buckets: list[BucketEntry] = []
    dropped: list[DroppedEntry] = Field(default=[], description="Buckets that are captured no more.")
    never_captured: list[NeverCapturedEntry] = Field(default=[], description="Compute pieces that no graph can hold.")
    misses: list[MissEntry] = []
    full: FullGraphs | None = Field(default=None, description="Full graphs, where mode is auto or full_and_piecewise.")
    addresses: list[Any] = Field(default=[], description="Memory whose address the graphs rely on.")


class Extras(_Entry):
    """What else was asked of Dynamo and depyf."""

    files: list[str] = []
    problems: list[str] = Field(default=[], description="One line for each thing that it could not do.")


class Summary(_Entry):
    """One program of one rank. Rewritten whole as each step finishes; ``progress`` says how far it got."""

    schema_version: int = SCHEMA_VERSION
    progress: Literal["traced", "split", "built", "not split"]
    name: str = Field(description="Class of the module (or the function) and the number of its graph.")
    rank: int
    process_id: int
    written_at: str = Field(description="Time of writing, ISO 8601, UTC.")
    versions: dict[str, str]
    config: list[OptionEntry]
    settings: str = Field(default="", description="The options that differ from the defaults.")
    not_split: str | None = Field(default=None, description="Why the graph went to the stock backend whole, if it did.")
    token_count: str | None = Field(default=None, description="Symbol or number that counts the tokens of a call.")
    token_reason: str = ""
    split_matches: dict[str, int] = Field(
        default={}, description="Pattern of split_ops -> number of ops that the graph was cut at."
    )
    attention_like: list[str] = Field(default=[], description="Ops that are named like attention and were not cut at.")
    unmatched_stage_inputs: list[str] = []
    landing_free_behind: int | None = Field(
        default=None, description="Step after which proxies may land again; None: only at the end of a call."
    )
    results_written_from: int | None = Field(
        default=None, description="Step that waits, under StageRunner, until the results of the last call have left."
    )
    entrance: str = Field(
        default="", description="How micro-batches entered the stage of a runner, and the cost of it."
    )
    links: list[str] = Field(default=[], description="How proxies and results travel, where that was found by trial.")
    inputs: list[InputEntry] = []
    pieces: list[PieceEntry] = []
    whole_plain_run: str | None = Field(default=None, description="Why a call ran the graph as it came, if one did.")
    graphs: Graphs = Graphs(mode="none")
    counters: dict[str, Any] = Field(default={}, description="Of this program; see stats.COUNTERS.")
    extras: Extras = Extras()

    @property
    def distinct_keys(self) -> list[str]:
        """Keys of the distinct compute pieces, in order of first use."""
        return list(dict.fromkeys(piece.key for piece in self.pieces if piece.kind == "compute"))
