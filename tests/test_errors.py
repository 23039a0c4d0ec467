from __future__ import annotations

import inspect

import pytest

from pp_piecewise_backend import errors, pipeline_sentences

CHILDREN = {
    "ConfigError",
    "SplitError",
    "UnmatchedName",
    "GradientFallback",
    "RecompileAfterSeal",
    "GraphMiss",
    "ReplayDiffers",
    "PlanMismatch",
    "PeerLost",
    "DumpError",
    "RankFailed",
}


def test_the_error_classes_are_frozen() -> None:
    classes = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}
    raised = {name for name, kind in classes.items() if issubclass(kind, Exception)}
    assert raised == CHILDREN | {"PPPiecewiseError", "PPPiecewiseWarning"}
    assert issubclass(errors.PPPiecewiseError, RuntimeError)
    assert all(classes[name].__base__ is errors.PPPiecewiseError for name in CHILDREN)
    assert issubclass(errors.PPPiecewiseWarning, UserWarning)
    assert all(classes[name].__doc__ for name in raised)


MESSAGES = {
    "unknown_option": (errors.unknown_option("mod", ["mode", "graphs"]), ["'mod'", "'mode'", "graphs"]),
    "unknown_environment_variable": (
        errors.unknown_environment_variable("PP_PIECEWISE_X", "1", "PP_PIECEWISE_Y", ["PP_PIECEWISE_Y"]),
        ["PP_PIECEWISE_X='1'", "PP_PIECEWISE_Y", "Unset it or rename it"],
    ),
    "bad_value": (
        errors.bad_value("option 'mode'", "non", "one of full, none", "", ["full", "none"]),
        ["option 'mode'", "'non'", "one of full, none", "nearest valid name is 'none'"],
    ),
    "options_not_a_mapping": (errors.options_not_a_mapping([1]), ["[1]", "list", "options={'compiler'"]),
    "unsupported_mode_keyword": (
        errors.unsupported_mode_keyword("reduce-overhead"),
        ["mode='reduce-overhead' was passed to torch.compile", "options={...}", "Remove mode="],
    ),
    "unsupported_keywords": (errors.unsupported_keywords(["depth"]), ["'depth'", "options={...}"]),
    "gradient_fallback": (
        errors.gradient_fallback(["weight"], "inductor"),
        ["'weight'", "stock backend 'inductor'", "torch.no_grad()", "requires_grad_(False)"],
    ),
    "internal_error": (
        errors.internal_error(KeyError("item")),
        ["KeyError: 'item'", "results are right", "report it"],
    ),
    "unmatched_split_ops": (
        errors.unmatched_split_ops(["mine"], ["aten::attn"]),
        ["'mine'", "look like attention: 'aten::attn'", "split_ops"],
    ),
    "unmatched_stage_inputs": (
        errors.unmatched_stage_inputs(["hidden"], ["hidden_states"]),
        ["'hidden'", "'hidden_states'", "stage inputs"],
    ),
    "program_is_not_saved": (
        errors.program_is_not_saved("Layers#0"),
        ["Layers#0", "not saved", "traces the model again"],
    ),
    "recompile_after_seal": (
        errors.recompile_after_seal("forward", 3),
        ["forward", "3 earlier", "seal()", "runs eagerly", "unseal()"],
    ),
    "bad_proxy": (
        errors.bad_proxy("dtype", "half", "a torch.dtype such as torch.bfloat16"),
        ["Proxy got dtype='half'", "expected a torch.dtype"],
    ),
    "bad_stage_inputs": (
        errors.bad_stage_inputs(["hidden_states"]),
        ["Stage got inputs=['hidden_states']", "mapping of argument names to Proxy", "'hidden_states': Proxy("],
    ),
    "bad_stage_tokens": (errors.bad_stage_tokens(0), ["Stage got max_tokens=0", "at least 1"]),
    "not_a_stage": (
        errors.not_a_stage("first"),
        ["option 'stage' is 'first' of type str", "pp_piecewise_backend.Stage", "leave the option out"],
    ),
    "two_max_tokens": (
        errors.two_max_tokens(64, 32),
        ["max_tokens=64 in the options", "max_tokens=32", "only to the Stage"],
    ),
    "two_stage_inputs": (
        errors.two_stage_inputs(["hidden"], ["hidden_states"]),
        ["stage_inputs names 'hidden'", "memory for 'hidden_states'", "only to the Stage"],
    ),
    "rows_out_of_range": (errors.rows_out_of_range(9, 8), ["views(9)", "max_tokens=8", "expected 1 to 8 rows"]),
    "stage_lacks_input": (
        errors.stage_lacks_input("residual", ["hidden_states"]),
        ["no memory for stage input 'residual'", "it has 'hidden_states'"],
    ),
    "stage_input_without_tokens": (
        errors.stage_input_without_tokens("residual", "float32[8]"),
        ["'residual' is float32[8]", "no dimension counts tokens"],
    ),
    "stage_input_differs": (
        errors.stage_input_differs("residual", "float32[s0, 8]", (4,), "torch.float16"),
        ["'residual' is float32[s0, 8]", "shape (4,)", "torch.float16", "Declare the Proxy"],
    ),
    "stage_on_other_device": (
        errors.stage_on_other_device("residual", "cuda:1", "cuda:0"),
        ["'residual' is on cuda:1", "memory is on cuda:0", "Give Stage(device='cuda:1')"],
    ),
    "graph_miss": (
        errors.graph_miss("Model#0", 7, "random", "it draws random numbers"),
        ["Model#0", "7 tokens", "(random): it draws random numbers", "strict=1", "explain()"],
    ),
    "bucket_dropped": (
        errors.bucket_dropped("Model#0", 64, 4096, 1024),
        ["Model#0", "bucket of 64 tokens", "4096 bytes", "allows 1024", "Raise the limit"],
    ),
    "full_replay_differs": (
        errors.full_replay_differs("Model#0", 64, "piece[0], tensor x, row 3"),
        ["Model#0", "bucket of 64", "piece[0], tensor x, row 3", "graph_safe_ops", "mode='piecewise'"],
    ),
    "not_known_graph_safe": (
        errors.not_known_graph_safe("my::attention"),
        ["my::attention is not", "graph_safe_ops", "mode='full_and_piecewise'"],
    ),
    "number_in_full_graph": (
        errors.number_in_full_graph(["max_seqlen"]),
        ["max_seqlen", "would freeze", "pass a tensor", "mode='full_and_piecewise'"],
    ),
    "RESULT_OF_AN_EARLIER_PIECE": (
        errors.RESULT_OF_AN_EARLIER_PIECE,
        ["a result lies in memory of an earlier piece", "clone()"],
    ),
    "NO_MEMORY_TO_COMPARE": (errors.NO_MEMORY_TO_COMPARE, ["no memory was left to compare"]),
    "copy_too_large": (
        errors.copy_too_large(4096, 5000),
        ["4096 bytes are more than half of the 5000", "mode='full_and_piecewise'"],
    ),
    "full_graph_gives_way": (
        errors.full_graph_gives_way("Model#0", 64, "piece[0], tensor x, row 3"),
        ["Model#0", "bucket of 64", "piece[0], tensor x, row 3", "same bits each time", "The pieces replay instead"],
    ),
    "moved": (
        errors.moved("mask lies elsewhere", 5, 32),
        ["mask lies elsewhere than at capture", "call 5 in a row", "least used of the 32 captures", "copied into them"],
    ),
    "replay_differs": (
        errors.replay_differs("Model#0", 64, "piece[2], tensor x, row 3"),
        ["Model#0", "bucket of 64 tokens", "piece[2], tensor x, row 3", "replayed no more", "report it"],
    ),
    "no_room_for_state": (errors.no_room_for_state(4096), ["no room for 4096 bytes", "smaller KV cache"]),
    "bad_make_inputs": (errors.bad_make_inputs([1]), ["returned list", "tuple (args, kwargs)", "{'input_ids': ids}"]),
    "bad_warmup_sizes": (errors.bad_warmup_sizes([0]), ["sizes=[0]", "each at least 1", "None for every bucket"]),
    "released_in_a_call": (errors.released_in_a_call("Model#0"), ["release() of Model#0", "within one of its calls"]),
    "WARMUP_IN_A_CAPTURE": (errors.WARMUP_IN_A_CAPTURE, ["a graph is being captured", "call it before"]),
    "compiled_in_a_capture": (
        errors.compiled_in_a_capture("forward"),
        ["forward met a new kind of input", "a graph is being captured", "call the module once", "warmup()"],
    ),
    "NOT_BETWEEN_MICRO_BATCHES": (
        errors.NOT_BETWEEN_MICRO_BATCHES,
        ["one thing at a time", "Call it between two micro-batches"],
    ),
    "CLOSED_RUNNER": (errors.CLOSED_RUNNER, ["the runner was closed", "stats, report() and", "Make a new StageRunner"]),
    "NESTED_WARMUP": (errors.NESTED_WARMUP, ["inside warmup()", "call it once"]),
    "NO_PROGRAM_IN_WARMUP": (
        errors.NO_PROGRAM_IN_WARMUP,
        ["no program of backend 'pp_piecewise' ran", "torch.compile(module, backend='pp_piecewise')"],
    ),
    "nothing_captured": (
        errors.nothing_captured(["graphs='off'"]),
        ["captured nothing", "graphs='off'"],
    ),
    "graphs_on_other_device": (
        errors.graphs_on_other_device("cuda", "cpu"),
        ["graphs='cuda'", "are on cpu", "runs compiled, without graphs"],
    ),
    "dump_failed": (
        errors.dump_failed("/dump", OSError("disk full")),
        ["/dump", "OSError: disk full", "results are not affected", "dump_dir"],
    ),
    "dump_incomplete": (
        errors.dump_incomplete("Model#0", "/dump", KeyError("x")),
        ["dump of Model#0 in /dump", "KeyError: 'x'", "Results are not affected", "report it"],
    ),
    "piece_not_written": (
        errors.piece_not_written("Model#0", 3, KeyError("x")),
        ["Model#0 piece[3]: cannot run here", "KeyError: 'x'", "dynamo_graph.py"],
    ),
    "dump_folder_taken": (
        errors.dump_folder_taken("/dump/rank_0", "/dump/rank_0.2"),
        ["/dump/rank_0 is there already", "into /dump/rank_0.2", "its own dump_dir", "RANK"],
    ),
    "depyf_failed": (errors.depyf_failed("code.py", KeyError("op")), ["depyf", "code.py", "KeyError: 'op'"]),
    "too_long_to_decompile": (errors.too_long_to_decompile(9, 5), ["9 instructions", "at most 5", "prepare_debug()"]),
    "not_a_dump": (errors.not_a_dump("/here", True), ["/here holds no dump", "summary.json", "PP_PIECEWISE_DUMP_DIR"]),
    "no_such_call": (errors.no_such_call(7, 3), ["--call 7", "1 to 3", "warm-ups"]),
    "unreadable_dump": (errors.unreadable_dump("/here", "no JSON"), ["/here", "no JSON", "dump again"]),
    "wrong_number_of_dumps": (errors.wrong_number_of_dumps(3), ["folders given: 3", "one dump", "two to compare"]),
    "plans_differ": (errors.plans_differ(["a is 1", "b is 2"]), ["a is 1; b is 2", "no data has moved"]),
    "plan_entry_differs": (
        errors.plan_entry_differs("max_tokens", {"8": [0, 2], "4": [1]}),
        ["max_tokens is 8 on ranks 0, 2, 4 on rank 1"],
    ),
    "wrong_count": (errors.wrong_count("stage_count", 3, 2), ["stage_count is 3", "2 ranks came"]),
    "wrong_sibling": (errors.wrong_sibling(3, 0, 1, 2), ["rank 3 is number 0", "begins with rank 2", "number 1"]),
    "not_divisible": (errors.not_divisible(1, "inputs", "h", 7, 2), ["'h' scattered with 7 elements", "2 tensor-par"]),
    "link_differs": (
        errors.link_differs(0, "outputs", "x", 1, "inputs", "y"),
        ["outputs of rank 0 are x", "inputs of rank 1 are y"],
    ),
    "link_leads_nowhere": (errors.link_leads_nowhere(0, "inputs"), ["rank 0 has inputs", "no neighbour"]),
    "bad_patience": (
        errors.bad_patience("silence_seconds", -1),
        ["timeout_s=-1", "positive", "StageRunner(timeout_s=)"],
    ),
    "link_names_differ": (errors.link_names_differ([], ["x"]), ["carries 'x'", "got nothing"]),
    "link_tensor_differs": (errors.link_tensor_differs("x", "this", "that"), ["'x' as that", "got this"]),
    "tag_too_long": (errors.tag_too_long(b"xx", 1), ["b'xx' has 2 bytes", "at most 1"]),
    "header_differs": (errors.header_differs("rank", 2, 1), ["its header has rank 2, expected 1"]),
    "announced_rows_out_of_range": (errors.announced_rows_out_of_range(9, 8), ["9 tokens", "expected 1 to 8"]),
    "wrong_turn": (errors.wrong_turn("sent", 2, 1), ["micro-batch 2 was to be sent", "turn of micro-batch 1"]),
    "ranks_missing_at_setup": (
        errors.ranks_missing_at_setup(1, "proxies", 2.0, "none"),
        ["rank 1", "set up proxies within 2 s: none", "setup_timeout_s"],
    ),
    "pipeline_of": (errors.pipeline_of([3, 5]), ["its pipeline of ranks 3, 5"]),
    "did_not_come": (errors.did_not_come([5]), ["rank 5 did not come"]),
    "peer_silent": (errors.peer_silent(1, 2.0), ["rank 1 has sent nothing for 2 s"]),
    "peer_closed": (errors.peer_closed(1, "reset"), ["connection to rank 1 broke (reset)"]),
    "peer_disagrees": (errors.peer_disagrees(1, "why"), ["rank 1 does not keep to the plan: why"]),
    "peer_failed": (errors.peer_failed(2, "silent", 1), ["rank 2 failed (silent), as rank 1 reports"]),
    "own_failure": (
        errors.own_failure(2, "hangs in its forward", 5, 2.5),
        ["rank 2 itself failed (hangs in its forward) at micro-batch 5", "(step_timeout_s=2.5)", "a larger"],
    ),
    "on_rank": (errors.on_rank(2, "waiting"), ["rank 2 was waiting"]),
    "runner_argument": (
        errors.runner_argument("receive", 1, "'early'"),
        ["StageRunner got receive=1: expected 'early'"],
    ),
    "micro_batch_argument": (
        errors.micro_batch_argument("tag", "x" * 200, "at most 24 bytes"),
        ["MicroBatch got tag='xxx", "xxx... of type str: expected at most 24 bytes"],
    ),
    "not_a_micro_batch": (errors.not_a_micro_batch(3), ["run() got 3 among", "expected MicroBatch"]),
    "bad_micro_batches": (errors.bad_micro_batches(3), ["run() got 3 for micro-batches", "expected an iterable"]),
    "inputs_not_a_mapping": (
        errors.inputs_not_a_mapping("make_inputs", [1]),
        ["make_inputs gave [1] of type list", "expected a dict", "{'positions': positions}"],
    ),
    "bad_stage_device": (
        errors.bad_stage_device("gpu", RuntimeError("no such device")),
        ["Stage got device='gpu'", "such as 'cpu' or 'cuda:0'", "no such device"],
    ),
    "ranks_share_no_memory": (
        errors.ranks_share_no_memory("cuda_ipc", [(1, "a"), (2, "")]),
        ["transport='cuda_ipc' links", "rank 1 on a and rank 2 on a machine that shares none", "transport='auto'"],
    ),
    "link_choice": (
        errors.link_choice("proxies from rank 0 to rank 1", "p2p", [], {}, {"cuda_ipc": "OSError: no"}),
        ["proxies from rank 0 to rank 1 go over p2p", "cuda_ipc failed at set-up (OSError: no)"],
    ),
    "no_transport_works": (errors.no_transport_works("why"), ["cannot be set up: why", "transport="]),
    "LANDED_DIFFERS": (errors.LANDED_DIFFERS, ["not what was sent"]),
    "left_to_the_end_of_the_process": (
        errors.left_to_the_end_of_the_process("communicators of NCCL", 10.0),
        ["communicators of NCCL", "within 10 s", "until this process ends"],
    ),
    "trial_takes_too_long": (errors.trial_takes_too_long(2.0), ["longer than 2 s"]),
    "not_in_landing_memory": (
        errors.not_in_landing_memory((3, 4)),
        ["[3, 4]", "Receiver.landing_memory()"],
    ),
    "place_differs": (
        errors.place_differs(8, 16, 4096, 12),
        ["16 bytes at offset 8", "4096 bytes", "12 bytes are sent"],
    ),
    "driver_failed": (
        errors.driver_failed("cuMemcpyAsync", "cuda:1", 400, "CUDA_ERROR_INVALID_HANDLE"),
        ["cuMemcpyAsync on cuda:1", "error 400 (CUDA_ERROR_INVALID_HANDLE)", 'transport="p2p"'],
    ),
    "NO_TRANSPORT": (errors.NO_TRANSPORT, ["init_process_group"]),
    "proxies_at_wrong_end": (errors.proxies_at_wrong_end("inputs", ["h"], 0, 2), ["stage 0 of 2", "got inputs ['h']"]),
    "runner_sets_option": (errors.runner_sets_option("stage"), ["'stage'", "Leave it out"]),
    "stage_returned": (errors.stage_returned("stage 1", "a list", ["h"]), ["stage 1 returned a list", "dict with 'h'"]),
    "step_is_late": (
        errors.step_is_late(1, 7, "forward", 2.0),
        ["rank 1 hangs at micro-batch 7, in its forward", "StageRunner(step_timeout_s=2)", "a larger step_timeout_s="],
    ),
    "finish_cannot_be": (errors.finish_cannot_be(3, 0, 2, True), ["stage 0 of 2", "finish=3", "last stage"]),
    "finish_returned_others": (errors.finish_returned_others("finish", ["a"], ["t"]), ["'a'", "exactly 't'"]),
    "feedback_differs": (
        errors.feedback_differs("finish", "t", "torch.int64[0]", "torch.int64[rows]", 8),
        ["'t' as torch.int64[0]", "1 to 8 rows", "change the Proxy"],
    ),
    "feedback_has_other_rows": (
        errors.feedback_has_other_rows("finish", 1, 2),
        ["finish returned feedback with 1 rows", "of 2 tokens", "leave feedback_rows out"],
    ),
    "stage_inputs_clash": (errors.stage_inputs_clash({"h"}), ["make_inputs gave 'h'", "Leave proxies out"]),
    "micro_batches_on_later_stage": (errors.micro_batches_on_later_stage(1), ["stage 1", "only the first stage"]),
    "NO_MICRO_BATCHES": (errors.NO_MICRO_BATCHES, ["no micro-batches on the first stage", "iterable of MicroBatch"]),
    "no_feedback_here": (errors.no_feedback_here(1), ["feedback()", "stage 1", "only the first stage"]),
    "RAN_ALREADY": (errors.RAN_ALREADY, ["new StageRunner"]),
    "OFFERED_OTHER_PLACES": (errors.OFFERED_OTHER_PLACES, ["offered before", "give it those."]),
    "NO_FEEDBACK_OUTSTANDING": (errors.NO_FEEDBACK_OUTSTANDING, ["none is under way", "feedback=False"]),
    "NO_MORE_FEEDBACK": (errors.NO_MORE_FEEDBACK, ["the last stage has stopped"]),
    "graph_breaks_in_stage": (errors.graph_breaks_in_stage(1, "print."), ["stage 1", "Dynamo says: print."]),
    "entered_through_dynamo": (
        errors.entered_through_dynamo(1, 8, "its graph was not split"),
        ["of 8 tokens", "stage 1 through Dynamo", "each time: its graph was not split"],
    ),
    "TRACE_AFTER_RUN": (errors.TRACE_AFTER_RUN, ["call it before"]),
    "lost_while": (errors.lost_while("why", "rank 2 was waiting"), ["broken: why. Meanwhile rank 2", "restart all"]),
}


OWN = (errors.__name__, pipeline_sentences.__name__)
CLAUSES = {
    "bucket_dropped", "moved", "replay_differs", "full_replay_differs", "full_graph_gives_way",
    "not_known_graph_safe", "number_in_full_graph", "NO_MEMORY_TO_COMPARE", "copy_too_large",
    "RESULT_OF_AN_EARLIER_PIECE",
    "graphs_on_other_device", "plan_entry_differs", "wrong_count", "wrong_sibling",
    "not_divisible",
    "link_differs", "link_leads_nowhere", "header_differs", "peer_silent", "peer_closed", "peer_disagrees",
    "peer_failed", "own_failure", "on_rank", "place_differs", "link_choice", "LANDED_DIFFERS", "trial_takes_too_long",
    "pipeline_of", "did_not_come",
}  # fmt: skip
"""Reasons that explain() and other sentences quote, so they have no full stop."""


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_say_what_was_got_and_what_to_do(name: str) -> None:
    text, words = MESSAGES[name]
    assert text.endswith(".") is (name not in CLAUSES)
    for word in words:
        assert word in text


def test_every_message_is_tested() -> None:
    messages = {
        name
        for name, value in vars(errors).items()
        if (inspect.isfunction(value) and value.__module__ in OWN and not name.startswith("_")) or name.isupper()
    }
    assert messages - {"nearest", "cause"} == set(MESSAGES)


def test_messages_when_there_is_nothing_to_list() -> None:
    assert "gradients are required, so" in errors.gradient_fallback([], "eager")
    assert "required by 'a', 'b', so" in errors.gradient_fallback(["a", "b"], "eager")
    assert "required by 'a', 'b' and 14 more, so" in errors.gradient_fallback(["a", "b", *"0" * 14], "eager")
    assert "No op in this graph looks like attention" in errors.unmatched_split_ops(["mine"], [])
    assert errors.nothing_captured([]) == "warmup() captured nothing: graphs are off."
    assert "It has no tensor inputs" in errors.unmatched_stage_inputs(["hidden"], [])
    assert errors.not_a_dump("/here", False).startswith("/here does not exist: ")
    assert "knows of no call yet" in errors.no_such_call(1, 0)
    assert "nearest" not in errors.bad_value("option 'mode'", 3, "one of full, none", "", ["full", "none"])


def test_nearest_names_what_is_near_only() -> None:
    assert errors.nearest("grpahs", ["mode", "graphs"]) == "graphs"
    assert errors.nearest("backend", ["mode", "max_tokens", "graphs"]) == errors.nearest("~", ["mode"]) == ""
    assert errors.unknown_option("backend", ["mode"]) == "unknown option 'backend' in options=. Valid options: mode."
    assert "PP_PIECEWISE_X='1'. Unset it" in errors.unknown_environment_variable("PP_PIECEWISE_X", "1", "", ["A"])
    assert errors.bad_value("variable A", "", "one of x, y", "", ["x", "y"]).endswith(
        " x, y. Leave it out, or unset it."
    )
