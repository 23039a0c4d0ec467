"""The sentences of ``errors.py`` that ranks of a pipeline cause, which are reached as ``errors.`` and their name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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
    given_as = {"silence_seconds": "timeout_s", "setup_seconds": "setup_timeout_s", "step_seconds": "step_timeout_s"}
    return (
        f"{given_as[name]}={seconds!r}: expected a positive number of seconds, given as StageRunner({given_as[name]}=)."
    )


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
        f"rank {rank} could not set up {what} within {setup_seconds:g} s: {cause(error)}. Look at the log of the rank "
        f"that did not come; setup_timeout_s allows more time."
    )


def pipeline_of(ranks: Sequence[int]) -> str:
    return f"its pipeline of {_ranks(ranks)}"


def did_not_come(ranks: Sequence[int]) -> str:
    return f"{_ranks(ranks)} did not come"


def peer_silent(peer: int, silence_seconds: float) -> str:
    return f"rank {peer} has sent nothing for {silence_seconds:g} s, not even a keep-alive"


def peer_closed(peer: int, error: object) -> str:
    return f"the connection to rank {peer} broke ({cause(error)})"


def peer_disagrees(peer: int, difference: str) -> str:
    return f"rank {peer} does not keep to the plan: {difference}"


def peer_failed(
    rank: int, reason: str, told_by: int, micro_batch: int | None = None, step_timeout_s: float | None = None
) -> str:
    return f"rank {rank} failed ({reason}){_at(micro_batch)}, as rank {told_by} reports{_limit(step_timeout_s)}"


def own_failure(rank: int, reason: str, micro_batch: int | None = None, step_timeout_s: float | None = None) -> str:
    return f"rank {rank} itself failed ({reason}){_at(micro_batch)}{_limit(step_timeout_s)}"


def _limit(step_timeout_s: float | None) -> str:
    if step_timeout_s is None:
        return ""
    return (
        f": the step took longer than StageRunner(step_timeout_s={step_timeout_s:g}) of that rank allows; its Python "
        f"stack is in its log, and a larger step_timeout_s= gives it more time if it is only slow"
    )


def _at(micro_batch: int | None) -> str:
    return "" if micro_batch is None else f" at micro-batch {micro_batch}"


def step_is_late(rank: int, micro_batch: int, part: str, step_timeout_s: float) -> str:
    return (
        f"rank {rank} hangs at micro-batch {micro_batch}, in its {part}: the step takes longer than "
        f"StageRunner(step_timeout_s={step_timeout_s:g}) allows, waits for other ranks not counted. The others are "
        f"notified. Give it more time with a larger step_timeout_s= if it is only slow."
    )


def on_rank(rank: int, doing: str) -> str:
    return f"rank {rank} was {doing}"


def lost_while(loss: str, doing: str, positions: str = "") -> str:
    """``doing``: what ``on_rank`` gave; ``positions``: where the ranks were, in a sentence."""
    return (
        f"the pipeline is broken: {loss}. Meanwhile {doing}. See the log of that rank, then restart all ranks."
        f"{' ' + positions if positions else ''}"
    )


# -------------------------------------------------------------------------------------------- runner


def runner_argument(name: str, got: object, expected: str) -> str:
    return f"StageRunner got {name}={_short(got)}: expected {expected}."


def micro_batch_argument(name: str, got: object, expected: str) -> str:
    return f"MicroBatch got {name}={_short(got)}: expected {expected}."


def _short(value: object) -> str:
    """What it is, in a line: modules and tensors say much of themselves."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]}... of type {type(value).__name__}"


def cause(error: object) -> str:
    """What an error says; its type, where it says nothing."""
    return str(error).strip() or type(error).__name__


def not_a_micro_batch(got: object) -> str:
    return f"run() got {_short(got)} among the micro-batches: expected MicroBatch, such as MicroBatch(num_tokens)."


def bad_micro_batches(got: object) -> str:
    return f"run() got {_short(got)} for micro-batches: expected an iterable of MicroBatch, such as a list."


def inputs_not_a_mapping(whose: str, got: object) -> str:
    """``whose``: who gave them, such as "make_inputs"."""
    return (
        f"{whose} gave {_short(got)} of type {type(got).__name__}: expected a dict of the module's own arguments by "
        f"name, such as {{'positions': positions}}; {{}} where it has none."
    )


def ranks_share_no_memory(transport: str, ends: Sequence[tuple[int, str]]) -> str:
    places = " and ".join(f"rank {rank} on {place or 'a machine that shares none'}" for rank, place in ends)
    return (
        f"transport={transport!r} links ranks of one Linux machine that can reach one another's memory, but got "
        f"{places}. transport='auto' goes over torch.distributed where they cannot."
    )


def link_choice(
    link: str,
    transport: str,
    sizes_bytes: Sequence[int],
    times_us: Mapping[str, Sequence[float]],
    failed: Mapping[str, str],
) -> str:
    parts = [f"{link} go over {transport}" if transport else f"{link} have no transport"]
    parts += [f"{way} failed at set-up ({cause})" for way, cause in failed.items()]
    for way, times in times_us.items():
        measured = ", ".join(f"{us:.0f} us for {size} bytes" for us, size in zip(times, sizes_bytes, strict=True))
        parts.append(f"{way} takes {measured}")
    return "; ".join(parts)


def no_transport_works(choice: str) -> str:
    """``choice``: what ``link_choice`` gave."""
    return f"the pipeline cannot be set up: {choice}. transport= of StageRunner asks for one way alone."


LANDED_DIFFERS = "what landed is not what was sent"


def trial_takes_too_long(longest_seconds: float) -> str:
    return f"a transfer took longer than {longest_seconds:g} s"


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


def left_to_the_end_of_the_process(what: str, seconds: float) -> str:
    return (
        f"{what}: not released within {seconds:g} s, as where a GPU waits for a rank that has stopped. What is left "
        f"stays until this process ends: end it, and start it again."
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


def feedback_has_other_rows(whose: str, rows: int, announced_rows: int) -> str:
    return (
        f"{whose} returned feedback with {rows} rows for a micro-batch of {announced_rows} tokens: expected as many, "
        "since feedback_rows='tokens'. Return a row for each token, or leave feedback_rows out."
    )


def stage_inputs_clash(names: Iterable[str]) -> str:
    return f"make_inputs gave {_listed(sorted(names))}, which the previous stage sends. Leave proxies out."


def micro_batches_on_later_stage(stage: int) -> str:
    return f"run() got micro-batches on stage {stage}: only the first stage takes them, the others follow it."


NO_MICRO_BATCHES = "run() got no micro-batches on the first stage: pass an iterable of MicroBatch."


def no_feedback_here(stage: int) -> str:
    return f"feedback() was called on stage {stage}: only the first stage of a pipeline with feedback has it."


NOT_BETWEEN_MICRO_BATCHES = (
    "a runner does one thing at a time, but warmup(), close() or the next micro-batch of run() was asked for while one "
    "of them is under way: from make_inputs, the module, finish or another thread. Call it between two micro-batches."
)

CLOSED_RUNNER = (
    "the runner was closed: it runs, warms up and hands out nothing any more. What it counted is still there: stats, "
    "report() and bucket_times(). Make a new StageRunner on all ranks."
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


def entered_through_dynamo(stage: int, num_tokens: int, reason: str) -> str:
    return (
        f"micro-batches of {num_tokens} tokens enter stage {stage} through Dynamo, which asks all its guards each "
        f"time: {reason}."
    )


TRACE_AFTER_RUN = "trace() was called after run(): call it before, so that no micro-batch is missing."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(str(rank) for rank in ranks)}"
