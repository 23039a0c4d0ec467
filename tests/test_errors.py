from __future__ import annotations

import inspect

import pytest

from pp_piecewise_backend import errors

CHILDREN = {
    "ConfigError",
    "SplitError",
    "UnmatchedName",
    "GradientFallback",
    "RecompileAfterSeal",
    "PlanMismatch",
    "PeerLost",
    "DumpError",
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
        ["'hidden'", "'hidden_states'", "stage_inputs"],
    ),
    "recompile_after_seal": (
        errors.recompile_after_seal("forward", 3),
        ["forward", "3 earlier", "seal()", "runs eagerly", "unseal()"],
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
    "not_a_dump": (errors.not_a_dump("/here"), ["/here holds no dump", "summary.json", "PP_PIECEWISE_DUMP_DIR"]),
    "unreadable_dump": (errors.unreadable_dump("/here", "no JSON"), ["/here", "no JSON", "dump again"]),
    "wrong_number_of_dumps": (errors.wrong_number_of_dumps(3), ["got 3 folders", "one dump", "two to compare"]),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_say_what_was_got_and_what_to_do(name: str) -> None:
    text, words = MESSAGES[name]
    assert text.endswith(".")
    for word in words:
        assert word in text


def test_every_message_is_tested() -> None:
    builders = {
        name
        for name, function in vars(errors).items()
        if inspect.isfunction(function) and function.__module__ == errors.__name__ and not name.startswith("_")
    }
    assert builders - {"nearest"} == set(MESSAGES)


def test_messages_when_there_is_nothing_to_list() -> None:
    assert "gradients are required, so" in errors.gradient_fallback([], "eager")
    assert "No op in this graph looks like attention" in errors.unmatched_split_ops(["mine"], [])
    assert "It has no tensor inputs" in errors.unmatched_stage_inputs(["hidden"], [])
    assert "nearest" not in errors.bad_value("option 'mode'", 3, "one of full, none", "", ["full", "none"])


def test_nearest_always_names_one() -> None:
    assert errors.nearest("grpahs", ["mode", "graphs"]) == "graphs"
    assert errors.nearest("~", ["mode"]) == "mode"
