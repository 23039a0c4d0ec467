"""Every exception, warning and user-facing sentence of the package; those about ranks are in ``pipeline_sentences``.

A sentence says what was got, what was expected and what to do about it. What has parts is built by a function,
which returns plain text, so that one text serves as a warning and, under ``strict``, as an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .pipeline_sentences import *  # noqa: F403
from .pipeline_sentences import _listed, cause


class PPPiecewiseError(RuntimeError):
    """Parent of every error that the package raises on purpose."""


class ConfigError(PPPiecewiseError):
    """An option or an environment variable is unknown, or its value cannot be used."""


class SplitError(PPPiecewiseError):
    """A graph cannot be cut into pieces without changing what it means."""


class UnmatchedName(PPPiecewiseError):
    """Under ``strict``: a split op or a stage input that was asked for is not in the graph."""


class GradientFallback(PPPiecewiseError):
    """Under ``strict``: a call needs gradients, which only stock Inductor provides."""


class RecompileAfterSeal(PPPiecewiseError):
    """Under ``strict``: a new graph arrived after ``seal()``."""


class GraphMiss(PPPiecewiseError):
    """Under ``strict``: a call could not replay its graphs, for another reason than being the first or too large."""


class ReplayDiffers(PPPiecewiseError):
    """Under ``strict``: ``verify_every`` found a replay that differs from the piece that it was captured from."""


class PlanMismatch(PPPiecewiseError):
    """The ranks of a pipeline were set up with plans that differ."""


class Position(NamedTuple):
    """Where a rank of the pipeline was, as far as the one that raises `PeerLost` knows."""

    rank: int
    micro_batch: int | None = None
    step: str = ""
    """In words, such as "in its forward of micro-batch 7"; empty where nothing is known."""
    since: float = 0.0
    """When it came there, in seconds since the epoch by the clock of who raises the error."""
    as_of: float = 0.0
    """When it said so: it may have gone on."""


class PeerLost(PPPiecewiseError):
    """Another rank of the pipeline died, fell silent or broke the agreed order."""

    def __init__(self, message: str = "", positions: Iterable[Position] = ()) -> None:
        super().__init__(message)
        self.positions = tuple(positions)
        """Of every rank, in their order; empty where the pipeline was not set up yet."""


class RankFailed(PPPiecewiseError):
    """A rank that was started as a process raised or died; ``rank`` is its number, ``trace`` its traceback if any."""

    def __init__(self, sentence: str, rank: int, trace: str = "") -> None:
        super().__init__(sentence)
        self.rank = rank
        self.trace = trace


class DumpError(PPPiecewiseError):
    """A folder holds no dump, or one that this version cannot read."""


class PPPiecewiseWarning(UserWarning):
    """Category of every warning that the package issues."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the name in ``valid`` that is spelled most like ``name``; "" where none is spelled much like it."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1)), "")


# ---------------------------------------------------------------------------------- configuration


def unknown_option(name: object, valid: Sequence[str]) -> str:
    near = nearest(str(name), valid)
    return (
        f"unknown option {name!r} in options={near and f': the nearest valid name is {near!r}'}. "
        f"Valid options: {', '.join(valid)}."
    )


def unknown_environment_variable(name: str, value: str, nearest_valid: str, valid: Sequence[str]) -> str:
    near = nearest_valid and f": the nearest valid name is {nearest_valid}"
    return (
        f"unknown environment variable {name}={value!r}{near}. "
        f"Unset it or rename it. Valid variables: {', '.join(valid)}."
    )


def bad_value(given_as: str, value: object, expected: str, detail: str, choices: Sequence[str] = ()) -> str:
    """``given_as`` names the source: "option 'mode'" or "environment variable PP_PIECEWISE_MODE"."""
    sentence = f"{given_as} has the value {value!r}: expected {expected}"
    if detail:
        sentence += f", but {detail}"
    if near := nearest(value, choices) if isinstance(value, str) else "":
        sentence += f". The nearest valid name is {near!r}"
    return sentence + (". Leave it out, or unset it." if value == "" else ".")


def options_not_a_mapping(options: object) -> str:
    return (
        f"options= must be a mapping of option names to values, such as options={{'compiler': 'eager'}}, "
        f"got {options!r} of type {type(options).__name__}."
    )


def unsupported_mode_keyword(mode: object) -> str:
    return (
        f"mode={mode!r} was passed to torch.compile; backend 'pp_piecewise' takes its settings as "
        f"options={{...}} only. Remove mode=, and see pp_piecewise_backend.Config for the options; "
        f"Inductor's own settings can stay in torch._inductor.config."
    )


def unsupported_keywords(names: Sequence[str]) -> str:
    return (
        f"torch.compile passed the keyword arguments {_listed(names)} to backend 'pp_piecewise', which "
        f"takes options={{...}} only. Put settings into options=."
    )


# ------------------------------------------------------------------------------ graphs and programs


def internal_error(error: Exception) -> str:
    """``error``: what was raised where nothing should have been."""
    return (
        f"an internal error of pp_piecewise_backend, {type(error).__name__}: {error}. The graph goes whole to the "
        f"stock backend; its results are right but it is not split. Please report it with the traceback from the log."
    )


def gradient_fallback(names: Sequence[str], compiler: str) -> str:
    """``names``: the inputs that require gradients, as a reader knows them (may be empty when none could be named)."""
    shown = _listed(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    return (
        f"to serve, call the model under torch.inference_mode() or torch.no_grad(), or call requires_grad_(False) on "
        f"it: gradients are required{f' by {shown}' if names else ''}, so this graph went whole to the stock backend "
        f"{compiler!r}. It is not split, and its proxies do not land in static memory."
    )


def unmatched_split_ops(patterns: Sequence[str], attention_like: Sequence[str]) -> str:
    """``patterns``: split ops given by name that matched nothing; ``attention_like``: ops in the graph."""
    seen = (
        f"Ops in this graph that look like attention: {_listed(attention_like)}. Name these in split_ops to split there"
        if attention_like
        else "No op in this graph looks like attention; check that the model calls it inside this graph"
    )
    return f"split_ops {_listed(patterns)} matched no op in the graph. {seen}."


def unmatched_stage_inputs(names: Sequence[str], candidates: Sequence[str]) -> str:
    """``candidates``: last components of the sources of the graph's tensor inputs, parameters excluded."""
    inputs = f"Its tensor inputs are {_listed(candidates)}" if candidates else "It has no tensor inputs"
    return (
        f"stage inputs {_listed(names)} matched no input of the graph. {inputs}. Give the names that the "
        f"model's forward uses for its proxies, or leave out those that this stage does not take."
    )


def program_is_not_saved(name: str) -> str:
    return (
        f"{name} is split and captured in each process: programs of pp_piecewise are not saved, so the next start "
        f"traces the model again; Inductor's own cache serves its pieces."
    )


def recompile_after_seal(code_name: str, programs_before: int) -> str:
    """``code_name``: the compiled function; ``programs_before``: how many programs it had at ``seal()``."""
    return (
        f"a new graph for {code_name} arrived after seal(), next to its {programs_before} earlier "
        f"program(s); it runs eagerly and nothing was compiled. Warm up with this kind of input before "
        f"seal(), mark the dimension that varies as dynamic, or call unseal()."
    )


# -------------------------------------------------------------------------------- static memory


def bad_proxy(field: str, value: object, expected: str) -> str:
    return f"Proxy got {field}={value!r}: expected {expected}."


def bad_stage_inputs(inputs: object) -> str:
    return (
        f"Stage got inputs={inputs!r}: expected a mapping of argument names to Proxy, such as "
        f"{{'hidden_states': Proxy((4096,), torch.bfloat16)}}."
    )


def bad_stage_tokens(max_tokens: object) -> str:
    return f"Stage got max_tokens={max_tokens!r}: expected the largest number of tokens of a call, at least 1."


def bad_stage_device(device: object, error: Exception) -> str:
    return f"Stage got device={device!r}: expected a device that is here, such as 'cpu' or 'cuda:0'; {cause(error)}."


def not_a_stage(value: object) -> str:
    return (
        f"option 'stage' is {value!r} of type {type(value).__name__}: expected a pp_piecewise_backend.Stage. Make one "
        f"for each module instance, or leave the option out."
    )


def two_max_tokens(option: int, stage: int) -> str:
    return (
        f"max_tokens={option} in the options, but the Stage was made for max_tokens={stage}. Give the same number in "
        f"both places, or only to the Stage."
    )


def two_stage_inputs(option: Sequence[str], stage: Sequence[str]) -> str:
    return (
        f"stage_inputs names {_listed(option)}, but the Stage has memory for {_listed(stage)}. Give the same names in "
        f"both places, or only to the Stage."
    )


def rows_out_of_range(num_tokens: int, max_tokens: int) -> str:
    return f"views({num_tokens}) of a Stage with max_tokens={max_tokens}: expected 1 to {max_tokens} rows."


def stage_lacks_input(name: str, names: Sequence[str]) -> str:
    return f"the Stage has no memory for stage input {name!r}; it has {_listed(names)}."


def stage_input_without_tokens(name: str, geometry: str) -> str:
    return f"stage input {name!r} is {geometry}, in which no dimension counts tokens."


def stage_input_differs(name: str, geometry: str, shape: Sequence[int], dtype: object) -> str:
    return (
        f"stage input {name!r} is {geometry} in the graph, but the Stage has rows of shape {tuple(shape)} and dtype "
        f"{dtype}. Declare the Proxy as the previous stage sends it."
    )


def stage_on_other_device(name: str, got: object, expected: object) -> str:
    return (
        f"stage input {name!r} is on {got}, but the Stage's memory is on {expected}. Give Stage(device={str(got)!r})."
    )


# ------------------------------------------------------------------------------- capture and replay


def graph_miss(program: str, num_tokens: int | None, code: str, sentence: str) -> str:
    """``num_tokens``: None where nothing says how many tokens the call has."""
    size = "" if num_tokens is None else f" of {num_tokens} tokens"
    return (
        f"{program}: a call{size} could not replay its graphs ({code}): {sentence}. strict=1 makes this an error; "
        f"explain() says more."
    )


def bucket_dropped(program: str, bucket: int, held_bytes: int, limit_bytes: int) -> str:
    return (
        f"{program}: with the bucket of {bucket} tokens, graphs hold {held_bytes} bytes where graph_memory_bytes "
        f"allows {limit_bytes}; calls of this bucket run without graphs. Raise the limit, or lower max_tokens"
    )


def moved(what: str, call: int | None, most: int | None) -> str:
    """``call``: which one with the same captures, if any but ``warmup()`` does; ``most``: captures that a bucket has,
    if it has as many as are kept."""
    when = "only warmup() captures" if call is None else f"call {call} in a row with the same captures it too"
    if most is not None:
        when += f", in place of the least used of the {most} captures that a bucket keeps"
    return (
        f"{what} than at capture; {when}. Keep the same tensors, with new values copied into them (copy_), and the "
        f"same numbers to replay in each call"
    )


def replay_differs(program: str, bucket: int, where: str) -> str:
    return (
        f"{program}: a replay in the bucket of {bucket} tokens differs from the piece that it was captured from: "
        f"{where}. The bucket is replayed no more; please report it with a dump"
    )


def not_known_graph_safe(op: str) -> str:
    return (
        f"mode='auto' makes them where every op is known to read nothing but its arguments, and {op} is not; name it "
        f"in graph_safe_ops if it reads nothing else, or choose mode='full_and_piecewise', which trusts ops in C++"
    )


def number_in_full_graph(names: Sequence[str]) -> str:
    return (
        f"the graph takes {', '.join(names)}, no tensor nor the token count, which a full graph would freeze; pass a "
        f"tensor, or choose mode='full_and_piecewise', which captures again for each value"
    )


NO_MEMORY_TO_COMPARE = "no memory was left to compare a replay of the whole graph with its pieces"


def copy_too_large(num_bytes: int, free_bytes: int) -> str:
    return (
        f"a full graph is compared with its pieces on copies of the state that it writes, and {num_bytes} bytes are "
        f"more than half of the {free_bytes} that are free; mode='full_and_piecewise' tries it all the same"
    )


def _full_replay_differs(program: str, bucket: int, where: str) -> str:
    differs = f"a replay of the whole graph in the bucket of {bucket} tokens differs from the graph itself"
    return f"{program}: {differs}: {where}."


def full_graph_gives_way(program: str, bucket: int, where: str) -> str:
    return (
        f"{_full_replay_differs(program, bucket, where)} Either an op reads more than its arguments, which the capture "
        f"froze, or a kernel does not give the same bits each time. The pieces replay instead"
    )


RESULT_OF_AN_EARLIER_PIECE = (
    "a result lies in memory of an earlier piece although no op says so, and the next replay would overwrite it while "
    "it is sent: clone() what the op returns"
)


def full_replay_differs(program: str, bucket: int, where: str, is_beside_pieces: bool = False) -> str:
    then = "Its pieces replay instead" if is_beside_pieces else "The bucket is replayed no more"
    return (
        f"{_full_replay_differs(program, bucket, where)} An op reads more than its arguments, which the capture froze. "
        f"{then}; take that op out of graph_safe_ops, or use mode='piecewise'"
    )


def no_room_for_state(num_bytes: int) -> str:
    return (
        f"warmup() copies the state that a call writes, to restore it, and there was no room for {num_bytes} bytes. "
        f"Let make_inputs give a smaller KV cache of its own, or warm up before the cache takes the memory."
    )


def bad_make_inputs(made: object) -> str:
    return (
        f"make_inputs returned {type(made).__name__}: expected a tuple (args, kwargs) for the module, such as "
        f"((), {{'input_ids': ids}})."
    )


def bad_warmup_sizes(sizes: object) -> str:
    return f"warmup() got sizes={sizes!r}: expected numbers of tokens, each at least 1, or None for every bucket."


NESTED_WARMUP = "warmup() was called inside warmup(); call it once, outside of make_inputs and of the module."

WARMUP_IN_A_CAPTURE = (
    "warmup() was called while a graph is being captured, which can hold nothing of what it does: call it before."
)


def compiled_in_a_capture(name: str) -> str:
    return (
        f"{name} met a new kind of input while a graph is being captured, and to compile it needs what no capture "
        f"allows: call the module once with inputs of this kind, or warmup(), before the capture begins."
    )


NO_PROGRAM_IN_WARMUP = (
    "warmup() called the module, but no program of backend 'pp_piecewise' ran. Pass what torch.compile(module, "
    "backend='pp_piecewise') returned."
)


def released_in_a_call(program: str) -> str:
    return f"release() of {program} was called from within one of its calls; call it when the call has returned."


def nothing_captured(reasons: Sequence[str]) -> str:
    return f"warmup() captured nothing: {'; '.join(r.rstrip('.') for r in reasons) or 'graphs are off'}."


def graphs_on_other_device(graphs: str, device: object) -> str:
    return f"graphs={graphs!r}, but the tensors of this graph are on {device}; it runs compiled, without graphs"


# --------------------------------------------------------------------------------------------- dumps


def dump_failed(folder: object, error: Exception) -> str:
    return (
        f"cannot write the dump into {folder}: {type(error).__name__}: {error}. This process dumps nothing more there; "
        f"its results are not affected. Give dump_dir a folder that can be written, with some MB free, or unset it."
    )


def dump_incomplete(name: str, folder: object, error: Exception) -> str:
    return (
        f"the dump of {name} in {folder} ends here: {type(error).__name__}: {error}. Results are not affected, and "
        f"other programs are dumped. Please report it with the traceback."
    )


def piece_not_written(name: str, index: int, error: Exception) -> str:
    return (
        f"{name} piece[{index}]: cannot run here: it could not be written as a script: {type(error).__name__}: "
        f"{error}. dynamo_graph.py next to this file has its ops."
    )


def dump_folder_taken(wanted: object, used: object) -> str:
    return (
        f"{wanted} is there already, from an earlier run or from a process with the same rank, so this one dumps into "
        f"{used}. Remove the old folder, give each run its own dump_dir, or set RANK in each process."
    )


def depyf_failed(file: str, error: Exception) -> str:
    return f"depyf could not make {file}: {type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.')}."


def too_long_to_decompile(count: int, most: int) -> str:
    return (
        f"the frame has {count} instructions and at most {most} are decompiled, since the time grows with the square; "
        f"wrap the first call in depyf.prepare_debug() to have it all."
    )


def not_a_dump(path: object, exists: bool) -> str:
    return (
        f"{path} {'holds no dump' if exists else 'does not exist'}: expected a folder with a summary.json, or with "
        f"folders of ranks and programs, as dump_dir or PP_PIECEWISE_DUMP_DIR had. Run the model once with one of them."
    )


def no_such_call(call: int, known: int) -> str:
    had = f"the calls that this dump knows of are 1 to {known}" if known else "this dump knows of no call yet"
    return f"--call {call}: {had}; those of warm-ups are not counted."


def wrong_number_of_dumps(count: int) -> str:
    return (
        f"folders given: {count}. Expected one dump to show, or two to compare; one with --call or --tokens; none with "
        f"--schema, which goes with nothing else."
    )


def unreadable_dump(path: object, detail: str) -> str:
    return (
        f"{path} cannot be read as a dump: {detail}. Expected a file that this version of pp_piecewise_backend wrote; "
        f"dump again, or inspect it with the version named in it."
    )
