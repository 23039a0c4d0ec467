"""Every exception, warning and user-facing sentence of the package.

A sentence says what was got, what was expected and what to do about it. What has parts is built by a function,
which returns plain text, so that one text serves as a warning and, under ``strict``, as an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


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


class PeerLost(PPPiecewiseError):
    """Another rank of the pipeline died, fell silent or broke the agreed order."""


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
    """Return the name in ``valid`` that is spelled most like ``name``; ``valid`` must not be empty."""
    return difflib.get_close_matches(name, list(valid), n=1, cutoff=0.0)[0]


# ---------------------------------------------------------------------------------- configuration


def unknown_option(name: object, valid: Sequence[str]) -> str:
    return (
        f"unknown option {name!r} in options=: the nearest valid name is {nearest(str(name), valid)!r}. "
        f"Valid options: {', '.join(valid)}."
    )


def unknown_environment_variable(name: str, value: str, nearest_valid: str, valid: Sequence[str]) -> str:
    return (
        f"unknown environment variable {name}={value!r}: the nearest valid name is {nearest_valid}. "
        f"Unset it or rename it. Valid variables: {', '.join(valid)}."
    )


def bad_value(given_as: str, value: object, expected: str, detail: str, choices: Sequence[str] = ()) -> str:
    """``given_as`` names the source: "option 'mode'" or "environment variable PP_PIECEWISE_MODE"."""
    sentence = f"{given_as} has the value {value!r}: expected {expected}"
    if detail:
        sentence += f", but {detail}"
    if choices and isinstance(value, str):
        sentence += f". The nearest valid name is {nearest(value, choices)!r}"
    return sentence + "."


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
        f"stage_inputs {_listed(names)} matched no input of the graph. {inputs}. Give the names that the "
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


def full_replay_differs(program: str, bucket: int, where: str, is_beside_pieces: bool = False) -> str:
    then = "Its pieces replay instead" if is_beside_pieces else "The bucket is replayed no more"
    return (
        f"{program}: a replay of the whole graph in the bucket of {bucket} tokens differs from the graph itself: "
        f"{where}. An op reads more than its arguments, which the capture froze. {then}; take "
        f"that op out of graph_safe_ops, or use mode='piecewise'"
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


# ------------------------------------------------------------------------------------------ hand-off


def plans_differ(differences: Sequence[str]) -> str:
    return (
        f"the ranks of this pipeline were set up differently: {'; '.join(differences)}. Start all ranks with the same "
        f"versions, options, proxies and partition; no data has moved."
    )


def plan_entry_differs(entry: str, ranks_with: Mapping[str, Sequence[int]]) -> str:
    """``ranks_with``: the ranks that have each value."""
    return f"{entry} is " + ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in ranks_with.items())


def wrong_count(entry: str, count: int, came: int) -> str:
    return f"{entry} is {count} on all ranks, but {came} ranks came"


def wrong_sibling(rank: int, got: object, expected: int, first_rank: int) -> str:
    return (
        f"rank {rank} is number {got} of its tensor-parallel group, but in the pipeline that begins with rank "
        f"{first_rank} all are number {expected} of theirs"
    )


def not_divisible(rank: int, key: str, name: str, elements: int, size: int) -> str:
    return (
        f"{key} of rank {rank} have {name!r} scattered with {elements} elements per token, which {size} "
        f"tensor-parallel ranks cannot share equally"
    )


def link_differs(source: int, sent: str, sends: object, target: int, taken: str, takes: object) -> str:
    return f"{sent} of rank {source} are {sends}, but {taken} of rank {target} are {takes}"


def link_leads_nowhere(rank: int, key: str) -> str:
    return f"rank {rank} has {key}, but no neighbour on that side"


def bad_patience(name: str, seconds: object) -> str:
    return f"{name}={seconds!r}: expected a positive number of seconds."


def link_names_differ(got: Sequence[str], expected: Sequence[str]) -> str:
    return f"the link carries {_listed(expected)}, but got {_listed(got) or 'nothing'}. Give exactly these tensors."


def link_tensor_differs(name: str, got: str, expected: str) -> str:
    return f"the link carries {name!r} as {expected}, but got {got}. Give what the plan says, or change the Proxy."


def tag_too_long(tag: bytes, most_bytes: int) -> str:
    return f"tag {tag!r} has {len(tag)} bytes: at most {most_bytes} fit into a header."


def header_differs(what: str, got: object, expected: object) -> str:
    return f"its header has {what} {got}, expected {expected}"


def announced_rows_out_of_range(num_tokens: int, max_tokens: int) -> str:
    return f"a micro-batch of {num_tokens} tokens was announced: expected 1 to {max_tokens}, as the plan says."


def wrong_turn(verb: str, got: int, expected: int) -> str:
    return (
        f"micro-batch {got} was to be {verb}, but it is the turn of micro-batch {expected}. Keep the order in which "
        f"they were announced."
    )


def ranks_missing_at_setup(rank: int, what: str, setup_seconds: float, error: object) -> str:
    return (
        f"rank {rank} could not set up {what} within {setup_seconds:g} s: {error}. Look at the log of the rank that "
        f"did not come; setup_timeout_s allows more time."
    )


def peer_silent(peer: int, silence_seconds: float) -> str:
    return f"rank {peer} has sent nothing for {silence_seconds:g} s, not even a keep-alive"


def peer_closed(peer: int, error: object) -> str:
    return f"the connection to rank {peer} broke ({error})"


def peer_disagrees(peer: int, difference: str) -> str:
    return f"rank {peer} does not keep to the plan: {difference}"


def peer_failed(rank: int, reason: str, told_by: int, micro_batch: int | None = None) -> str:
    return f"rank {rank} failed ({reason}){_at(micro_batch)}, as rank {told_by} reports"


def own_failure(rank: int, reason: str, micro_batch: int | None = None) -> str:
    return f"rank {rank} itself failed ({reason}){_at(micro_batch)}"


def _at(micro_batch: int | None) -> str:
    return "" if micro_batch is None else f" at micro-batch {micro_batch}"


def step_is_late(rank: int, micro_batch: int, part: str, step_timeout_s: float) -> str:
    return (
        f"rank {rank} hangs at micro-batch {micro_batch}, in its {part}: the step takes longer than step_timeout_s="
        f"{step_timeout_s:g}, waits for other ranks not counted. The other ranks are notified. Give it more time if it "
        f"is only slow."
    )


def on_rank(rank: int, doing: str) -> str:
    return f"rank {rank} was {doing}"


def lost_while(loss: str, doing: str) -> str:
    """``doing``: what ``on_rank`` gave."""
    return f"the pipeline is broken: {loss}. Meanwhile {doing}. See the log of that rank, then restart all ranks."


# -------------------------------------------------------------------------------------------- runner


def runner_argument(name: str, got: object, expected: str) -> str:
    return f"StageRunner got {name}={got!r}: expected {expected}."


def ranks_share_no_memory(transport: str, ends: Sequence[tuple[int, str]]) -> str:
    places = " and ".join(f"rank {rank} on {place or 'a machine that shares none'}" for rank, place in ends)
    return (
        f"transport={transport!r} links ranks of one Linux machine that can reach one another's memory, but got "
        f"{places}. transport='auto' goes over torch.distributed where they cannot."
    )


def not_in_landing_memory(shape: tuple[int, ...]) -> str:
    return (
        f"a tensor of shape {list(shape)} was to be received outside of the memory that the previous stage writes "
        "into: receive into tensors that lie in Receiver.landing_memory()."
    )


OFFERED_OTHER_PLACES = "a receive whose places were offered before got views elsewhere; give it those."


def place_differs(offset: int, num_bytes: int, block_bytes: int, tensor_bytes: int) -> str:
    return (
        f"the next stage has room for {num_bytes} bytes at offset {offset} of its {block_bytes} bytes of landing "
        f"memory, but {tensor_bytes} bytes are sent"
    )


def driver_failed(call: str, device: str, code: int, name: str) -> str:
    return (
        f"{call} on {device} failed with CUDA driver error {code} ({name}); without CUDA IPC, stages hand over with "
        'transport="p2p".'
    )


NO_TRANSPORT = (
    "StageRunner found no initialised torch.distributed to reach the other stages: call "
    "torch.distributed.init_process_group (torchrun sets what it needs), or pass a transport."
)


def proxies_at_wrong_end(name: str, got: Sequence[str], stage: int, stage_count: int) -> str:
    where = "the first" if stage == 0 else "the last" if stage == stage_count - 1 else "a middle"
    rule = {"inputs": "all stages but the first have", "outputs": "all stages but the last have"}
    expected = rule.get(name, "only the first and the last stage have")
    return f"stage {stage} of {stage_count}, {where} one, got {name} {list(got) or None}: {expected} {name}."


def runner_sets_option(name: str) -> str:
    return f"the option {name!r} is set by StageRunner itself. Leave it out of options."


def stage_returned(whose: str, got: object, names: Sequence[str]) -> str:
    """``whose``: what returned it, such as "the module of stage 0"."""
    return f"{whose} returned {got}: expected a dict with {_listed(names)}."


def finish_cannot_be(finish: object, stage: int, stage_count: int, has_feedback: bool) -> str:
    place = f"stage {stage} of {stage_count}, which has {'feedback' if has_feedback else 'no feedback'}"
    return (
        f"{place}, got finish={finish!r}: expected a function (output, tag) -> dict of tensors, on the last stage of a "
        f"pipeline with feedback. Elsewhere nothing takes what it returns: leave it out."
    )


def finish_returned_others(whose: str, got: Sequence[str], names: Sequence[str]) -> str:
    return (
        f"{whose} also returned {_listed(got)}, which nothing takes: expected exactly {_listed(names)}. Leave the "
        f"others out, or declare them in feedback on the first and the last stage."
    )


def feedback_differs(whose: str, name: str, got: str, expected: str, most_rows: int) -> str:
    return (
        f"{whose} returned {name!r} as {got}: expected {expected}, with 1 to {most_rows} rows, equally many in each "
        f"tensor. Return what the Proxy in feedback says, or change the Proxy."
    )


def stage_inputs_clash(names: Iterable[str]) -> str:
    return f"make_inputs gave {_listed(sorted(names))}, which the previous stage sends. Leave proxies out."


def micro_batches_on_later_stage(stage: int) -> str:
    return f"run() got micro-batches on stage {stage}: only the first stage takes them, the others follow it."


NO_MICRO_BATCHES = "run() got no micro-batches on the first stage: pass an iterable of MicroBatch."


def no_feedback_here(stage: int) -> str:
    return f"feedback() was called on stage {stage}: only the first stage of a pipeline with feedback has it."


NOT_BETWEEN_MICRO_BATCHES = (
    "a runner does one thing at a time, but warmup() or the next micro-batch of run() was asked for while one of them "
    "is under way: from make_inputs, the module, finish or another thread. Call warmup() between two micro-batches."
)

RAN_ALREADY = "run() was called before: a pipeline runs once, since its end stops all ranks. Make a new StageRunner."

NO_FEEDBACK_OUTSTANDING = (
    "feedback() was called, but that of all micro-batches so far was read, and none is under way that would have any. "
    "Give run() the next MicroBatch first; one with feedback=False has none."
)

NO_MORE_FEEDBACK = "feedback() was called, but the last stage has stopped and all that it sent was read."


def graph_breaks_in_stage(stage: int, reason: str) -> str:
    return (
        f"the module of stage {stage} breaks into several graphs: its landing memory is released at the end of each "
        f"forward, and each forward waits for the send of the one before. Dynamo says: {reason}"
    )


TRACE_AFTER_RUN = "trace() was called after run(): call it before, so that no micro-batch is missing."


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
        f"got {count} folders: expected one dump to show, or two to compare; one with --call or --tokens; none with "
        f"--schema, which goes with nothing else."
    )


def unreadable_dump(path: object, detail: str) -> str:
    return (
        f"{path} cannot be read as a dump: {detail}. Expected a file that this version of pp_piecewise_backend wrote; "
        f"dump again, or inspect it with the version named in it."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(str(rank) for rank in ranks)}"
