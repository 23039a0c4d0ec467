from __future__ import annotations

import copy
import inspect
import pickle
import pydoc
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Literal, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkout import CHECKOUT
from pp_piecewise_backend.config import FIELD_NAMES, Config, GivenOptions, SizeRange, SplitOps, rank_in_environment
from pp_piecewise_backend.errors import ConfigError

DEFAULTS = {
    "enabled": ("PP_PIECEWISE", "1"),
    "mode": ("PP_PIECEWISE_MODE", "auto"),
    "full_max_tokens": ("PP_PIECEWISE_FULL_MAX_TOKENS", "512"),
    "graphs": ("PP_PIECEWISE_GRAPHS", "auto"),
    "compiler": ("PP_PIECEWISE_COMPILER", "inductor"),
    "split_ops": ("PP_PIECEWISE_SPLIT_OPS", "built-in"),
    "capture_sizes": (
        "PP_PIECEWISE_CAPTURE_SIZES",
        "1,2,4,8:64:8,80:256:16,288:512:32,576:1024:64,1280:4096:256,4608::512",
    ),
    "max_tokens": ("PP_PIECEWISE_MAX_TOKENS", "2048"),
    "stage_inputs": ("PP_PIECEWISE_STAGE_INPUTS", "hidden_states,residual"),
    "row_wise_ops": ("PP_PIECEWISE_ROW_WISE_OPS", "none"),
    "graph_safe_ops": ("PP_PIECEWISE_GRAPH_SAFE_OPS", "none"),
    "padding": ("PP_PIECEWISE_PADDING", "tested"),
    "capture": ("PP_PIECEWISE_CAPTURE", "lazy"),
    "keep": ("PP_PIECEWISE_KEEP", "all"),
    "graph_memory_bytes": ("PP_PIECEWISE_GRAPH_MEMORY_BYTES", "unlimited"),
    "strict": ("PP_PIECEWISE_STRICT", "0"),
    "static_outputs": ("PP_PIECEWISE_STATIC_OUTPUTS", "0"),
    "verify_every": ("PP_PIECEWISE_VERIFY_EVERY", "0"),
    "dump_dir": ("PP_PIECEWISE_DUMP_DIR", "unset"),
}

# name -> (text, the same as a Python value, what the config then holds), none of them the default
OTHER_VALUES = {
    "enabled": ("0", False, False),
    "mode": ("none", "none", "none"),
    "full_max_tokens": ("64", 64, 64),
    "graphs": ("emulate", "emulate", "emulate"),
    "compiler": ("eager", "eager", "eager"),
    "split_ops": (
        "+mine::attention*,other",
        ["+mine::attention*", "other"],
        SplitOps(("mine::attention*", "other"), True),
    ),
    "capture_sizes": ("1,2,8", [1, 2, 8], (SizeRange(1, 1), SizeRange(2, 2), SizeRange(8, 8))),
    "max_tokens": ("64", 64, 64),
    "stage_inputs": ("x,y", ["x", "y"], ("x", "y")),
    "row_wise_ops": ("mine::norm*,other", ["mine::norm*", "other"], ("mine::norm*", "other")),
    "graph_safe_ops": ("mine::norm*,scale", ["mine::norm*", "scale"], ("mine::norm*", "scale")),
    "padding": ("never", "never", "never"),
    "capture": ("warmup", "warmup", "warmup"),
    "keep": ("if_faster", "if_faster", "if_faster"),
    "graph_memory_bytes": ("2G", 2 * 2**30, 2 * 2**30),
    "strict": ("true", True, True),
    "static_outputs": ("1", 1, True),
    "verify_every": ("10", 10, 10),
    "dump_dir": ("/some/folder", Path("/some/folder"), Path("/some/folder")),
}


def message(options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.resolve(options)  # type: ignore[arg-type]
    return str(caught.value)


# ------------------------------------------------------------------------------------- surface


def test_fields_environment_names_and_defaults_are_frozen() -> None:
    rows = {row.name: (row.environment_name, row.value) for row in Config.resolve().table()}
    assert rows == DEFAULTS
    assert list(rows) == list(DEFAULTS)


def test_every_field_has_one_help_sentence() -> None:
    for row in Config.resolve().table():
        assert row.help.endswith(".") and row.help.count(". ") == 0, row


def test_help_shows_every_option_with_its_default_and_its_sentence() -> None:
    signature = inspect.signature(Config)
    assert list(signature.parameters) == list(FIELD_NAMES)
    assert "mode: Literal['auto', 'piecewise', 'full', 'full_and_piecewise', 'none'] = 'auto'" in str(signature)
    assert "max_tokens: int = 2048" in str(signature) and f"= {DEFAULTS['capture_sizes'][1]!r}" in str(signature)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    assert Config(**defaults) == Config()
    shown = pydoc.plain(pydoc.render_doc(Config))
    assert all(f"{row.name}: {row.help}" in shown for row in Config().table())
    assert "TextForm(" not in shown and "function" not in str(signature)


def test_type_checkers_know_every_option() -> None:
    declared, held = get_type_hints(GivenOptions), get_type_hints(Config)
    assert list(declared) == list(FIELD_NAMES)
    literals = [name for name in FIELD_NAMES if get_origin(held[name]) is Literal]
    assert len(literals) == 6 and all(declared[name] == held[name] for name in literals)


WRONG = ("compler='eager'", "compiler='inducter'", "compiler=3", "max_tokens=2.5", "stage_inputs=3", "strict=None")


@pytest.mark.slow  # mypy reads the whole package
def test_type_checkers_take_text_and_python_values_and_refuse_others(tmp_path: Path) -> None:
    right = [f"{name}={value!r}" for name, values in OTHER_VALUES.items() for value in values]
    lines = ["from pathlib import PosixPath", "from pp_piecewise_backend.config import Config, SizeRange, SplitOps"]
    lines += [f"Config({argument})" for argument in (*right, *WRONG)]
    (tmp_path / "program.py").write_text("\n".join(lines))
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\nstrict = true\nfollow_imports = silent\n[mypy-torch.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), str(tmp_path / "program.py")]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=280)
    refused = {int(number) for number in re.findall(r"program\.py:(\d+): error", done.stdout)}
    assert [lines[number - 1] for number in sorted(refused)] == [f"Config({argument})" for argument in WRONG], (
        done.stdout
    )


# ---------------------------------------------------------------------------------- precedence


@pytest.mark.parametrize("name", FIELD_NAMES)
def test_each_field_takes_text_and_python_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value, held = OTHER_VALUES[name]
    assert getattr(Config.resolve({name: text}), name) == held
    assert getattr(Config.resolve({name: value}), name) == held
    monkeypatch.setenv(DEFAULTS[name][0], text)
    from_environment = Config.resolve()
    assert getattr(from_environment, name) == held
    assert from_environment.sources[name] == "environment"
    assert held != getattr(Config, name)


@pytest.mark.parametrize("name", FIELD_NAMES)
def test_the_text_form_of_a_value_reads_back_as_the_value(name: str) -> None:
    for value in (OTHER_VALUES[name][1], DEFAULTS[name][1]):
        before = Config.resolve({name: value})
        text = {row.name: row.value for row in before.table()}[name]
        assert Config.resolve({name: text}) == before


def test_option_beats_environment_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PP_PIECEWISE_COMPILER", "eager")
    monkeypatch.setenv("PP_PIECEWISE_MAX_TOKENS", "16")
    resolved = Config.resolve({"compiler": "aot_eager"})
    assert (resolved.compiler, resolved.max_tokens, resolved.padding) == ("aot_eager", 16, "tested")
    assert resolved.sources["compiler"] == "option"
    assert resolved.sources["max_tokens"] == "environment"
    assert resolved.sources["padding"] == "default"
    assert [row.source for row in resolved.table()].count("default") == len(FIELD_NAMES) - 2


def test_an_option_equal_to_the_default_is_still_an_option() -> None:
    assert Config.resolve({"compiler": "inductor"}).sources["compiler"] == "option"


def test_an_option_hides_a_bad_environment_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PP_PIECEWISE_COMPILER", "nonsense")
    assert Config.resolve({"compiler": "eager"}).compiler == "eager"


def test_the_environment_is_read_at_each_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Config.resolve()
    monkeypatch.setenv("PP_PIECEWISE_STRICT", "1")
    assert (before.strict, Config.resolve().strict) == (False, True)


def test_dotenv_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("PP_PIECEWISE_COMPILER=eager\nCOMPILER=eager\n")
    monkeypatch.chdir(tmp_path)
    assert Config.resolve().compiler == "inductor"


def test_bare_field_names_in_the_environment_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILER", "eager")
    monkeypatch.setenv("compiler", "eager")
    assert Config.resolve().compiler == "inductor"


# -------------------------------------------------------------------------------- value object


def test_configs_are_frozen_hashable_picklable_and_compare_by_value() -> None:
    one = Config.resolve({"compiler": "eager", "capture_sizes": "1,2"})
    other = Config(compiler="eager", capture_sizes=[1, 2], mode="auto")
    assert one == other and hash(one) == hash(other) and len({one, other}) == 1
    assert one != Config.resolve() and one != "a string"
    for copied in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert copied == one and copied.sources == one.sources
    with pytest.raises(FrozenInstanceError):
        one.compiler = "inductor"
    with pytest.raises(TypeError):
        one.sources["compiler"] = "default"  # type: ignore[index]


def test_repr_names_what_differs_from_the_defaults_and_reads_back() -> None:
    options = {name: value for name, (_, value, _) in OTHER_VALUES.items() if name != "dump_dir"}
    full = Config.resolve(options)
    assert repr(Config.resolve()) == "Config()"
    assert repr(Config.resolve({"compiler": "eager"})) == str(Config(compiler="eager")) == "Config(compiler='eager')"
    assert eval(repr(full), {"Config": Config}) == full


def test_cache_key_changes_with_the_compiler_only() -> None:
    base = Config.resolve().cache_key()
    different = {name for name in FIELD_NAMES if Config.resolve({name: OTHER_VALUES[name][0]}).cache_key() != base}
    assert different == {"compiler"}


# --------------------------------------------------------------------------------- text forms


@pytest.mark.parametrize("value", [True, 1, "1", "true", "True"])
def test_flags_that_are_on(value: object) -> None:
    assert Config.resolve({"strict": value}).strict is True


@pytest.mark.parametrize("value", ["yes", "on", "", " 1", "2", 2, -1, 1.0, None, [True]])
def test_flags_take_nothing_else(value: object) -> None:
    assert f"option 'strict' has the value {value!r}: expected 0, 1, true or false" in message({"strict": value})


@pytest.mark.parametrize(
    ("given_value", "held", "text"),
    [
        (None, SplitOps((), True), "built-in"),
        ("built-in", SplitOps((), True), "built-in"),
        ("a", SplitOps(("a",), False), "a"),
        (" a , b ", SplitOps(("a", "b"), False), "a,b"),
        ("+a,b", SplitOps(("a", "b"), True), "+a,b"),
        (("+ a", "b"), SplitOps(("a", "b"), True), "+a,b"),
        (["a", "b", "a"], SplitOps(("a", "b"), False), "a,b"),
        ([], SplitOps((), False), "none"),
        ("none", SplitOps((), False), "none"),
        (SplitOps(("x",), True), SplitOps(("x",), True), "+x"),
    ],
)
def test_split_ops(given_value: object, held: SplitOps, text: str) -> None:
    resolved = Config.resolve({"split_ops": given_value})
    assert resolved.split_ops == held
    assert str(resolved.split_ops) == text


@pytest.mark.parametrize("value", ["", "a,,b", "+", "+,a", "a,+b", "++a", 3, ["a", 3], [""]])
def test_bad_split_ops(value: object) -> None:
    assert "expected names or globs separated by commas" in message({"split_ops": value})


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("1000", 1000), ("3K", 3072), ("5m", 5 * 2**20), ("2G", 2**31), ("unlimited", None)],
)
def test_bytes(text: str, number: int | None) -> None:
    assert Config.resolve({"graph_memory_bytes": text}) == Config.resolve({"graph_memory_bytes": number})
    assert Config.resolve({"graph_memory_bytes": text}).graph_memory_bytes == number


@pytest.mark.parametrize("value", ["1.5G", "-1", -1, "G", "1KB", "", 1.5, True])
def test_bad_bytes(value: object) -> None:
    assert "expected a number of bytes such as 1048576, 512K, 64M or 2G, or 'unlimited'" in message(
        {"graph_memory_bytes": value}
    )


@pytest.mark.parametrize("value", ["x y", "a,a", "", "1a", 3, "a,,b"])
def test_bad_stage_inputs(value: object) -> None:
    assert "option 'stage_inputs' has the value" in message({"stage_inputs": value})


def test_no_stage_inputs() -> None:
    assert Config.resolve({"stage_inputs": []}) == Config.resolve({"stage_inputs": "none"})
    assert Config.resolve({"stage_inputs": []}).stage_inputs == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", "1_0"),
        ("verify_every", -1),
        ("max_tokens", True),
        ("max_tokens", 1.0),
        ("verify_every", ""),
    ],
)
def test_bad_whole_numbers(name: str, value: object) -> None:
    assert f"option {name!r} has the value {value!r}: expected a whole number, at least" in message({name: value})


@pytest.mark.parametrize("value", ["", 3, b"x"])
def test_bad_folder(value: object) -> None:
    assert "option 'dump_dir' has the value" in message({"dump_dir": value})


# ------------------------------------------------------------------------------ capture sizes


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("", "'' is neither 'size' nor 'first:last:step' nor 'first::step'"),
        ("1:2", "'1:2' is neither"),
        ("a", "'a' is neither"),
        ("1,,2", "'' is neither"),
        ("-1", "'-1' is neither"),
        ("0", "'0' has a number below 1"),
        ("8:16:0", "'8:16:0' has a number below 1"),
        ("16:8:4", "'16:8:4' ends before it starts"),
        ("8:17:8", "'8:17:8' steps over its last size 17"),
        ("4,2", "'2' does not lie above '4'"),
        ("4,4", "'4' does not lie above '4'"),
        ("1:8:1,8", "'8' does not lie above '1:8:1'"),
        ("8::8,64", "'64' does not lie above '8::8'"),
        ([1, "2"], "'2' is not a size"),
        ([True], "True is not a size"),
    ],
)
def test_bad_capture_sizes_say_what_is_wrong(value: object, what: str) -> None:
    assert what in message({"capture_sizes": value})


@pytest.mark.parametrize("value", [[], 8, None, 1.5])
def test_capture_sizes_of_another_kind(value: object) -> None:
    assert "expected ascending token counts" in message({"capture_sizes": value})


@st.composite
def ladders(draw: st.DrawFn) -> tuple[SizeRange, ...]:
    ladder = []
    floor = 0
    for _ in range(draw(st.integers(1, 6))):
        first = floor + draw(st.integers(1, 50))
        step = draw(st.integers(1, 20))
        floor = first + step * draw(st.integers(0, 9))
        ladder.append(SizeRange(first, floor, step))
    if draw(st.booleans()):
        ladder.append(SizeRange(floor + draw(st.integers(1, 50)), None, draw(st.integers(1, 20))))
    return tuple(ladder)


@given(ladders())
def test_ladders_print_and_read_back(ladder: tuple[SizeRange, ...]) -> None:
    printed = ",".join(map(str, ladder))
    assert Config.resolve({"capture_sizes": printed}).capture_sizes == ladder
    assert Config.resolve({"capture_sizes": ladder}).capture_sizes == ladder


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=20))
def test_lists_of_sizes_must_ascend(sizes: list[int]) -> None:
    if sizes == sorted(set(sizes)):
        assert Config.resolve({"capture_sizes": sizes}) == Config.resolve({"capture_sizes": ",".join(map(str, sizes))})
    else:
        assert "does not lie above" in message({"capture_sizes": sizes})


# ------------------------------------------------------------------------------ error messages


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("compilr", "compiler"),
        ("split_op", "split_ops"),
        ("maxtokens", "max_tokens"),
        ("Mode", "mode"),
        ("stage_input", "stage_inputs"),
    ],
)
def test_unknown_options_name_the_nearest(wrong: str, nearest: str) -> None:
    text = message({wrong: 1})
    assert f"unknown option {wrong!r}" in text
    assert f"nearest valid name is {nearest!r}" in text
    assert all(name in text for name in FIELD_NAMES)


def test_names_of_python_are_no_options() -> None:
    for name in ("self", "_sources", "__class__"):
        assert f"unknown option {name!r}" in message({name: "x"})


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("PP_PIECEWISE_COMPILR", "PP_PIECEWISE_COMPILER"),
        ("PP_PIECEWISE_ENABLED", "PP_PIECEWISE"),
        ("PP_PIECEWISE_MAXTOKENS", "PP_PIECEWISE_MAX_TOKENS"),
        ("PP_PIECEWISEMODE", "PP_PIECEWISE_MODE"),
    ],
)
def test_unknown_variables_name_the_nearest(wrong: str, nearest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(wrong, "7")
    text = message({})
    assert f"unknown environment variable {wrong}='7'" in text
    assert f"nearest valid name is {nearest}. Unset it or rename it" in text


def test_what_is_like_no_option_gets_no_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nearest" not in message({"backend": 1}) and "Valid options: enabled, mode, " in message({"backend": 1})
    monkeypatch.setenv("PP_PIECEWISE_DEBUG", "1")
    assert "variable PP_PIECEWISE_DEBUG='1'. Unset it or rename it. Valid variables: " in message({})


def test_an_empty_variable_is_to_be_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PP_PIECEWISE_COMPILER", "")
    assert message({}).endswith("expected one of inductor, aot_eager, eager. Leave it out, or unset it.")


def test_bad_values_name_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    assert message({"mode": "piecewis"}) == (
        "option 'mode' has the value 'piecewis': expected one of auto, piecewise, full, "
        "full_and_piecewise, none. "
        "The nearest valid name is 'piecewise'."
    )
    monkeypatch.setenv("PP_PIECEWISE_COMPILER", "inducto")
    assert message(None) == (
        "environment variable PP_PIECEWISE_COMPILER has the value 'inducto': expected one of inductor, "
        "aot_eager, eager. The nearest valid name is 'inductor'."
    )


def test_all_bad_values_are_reported_at_once() -> None:
    text = message({"mode": 3, "max_tokens": 0, "compiler": "eager"})
    assert "'mode'" in text and "'max_tokens'" in text and "'compiler'" not in text


@pytest.mark.parametrize("options", [["mode"], "mode=none", 3])
def test_options_must_be_a_mapping(options: object) -> None:
    text = message(options)
    assert "options= must be a mapping of option names to values" in text
    assert f"got {options!r} of type {type(options).__name__}" in text


def test_option_names_must_be_text() -> None:
    assert "unknown option 3" in message({3: 4})


def test_the_constructor_raises_the_same_errors() -> None:
    with pytest.raises(ConfigError, match="unknown option 'mod'"):
        Config(mod="none")
    with pytest.raises(ConfigError, match="option 'mode' has the value"):
        Config(mode="nothing")


@pytest.mark.parametrize(("text", "rank"), [(None, 0), ("0", 0), ("3", 3), ("", 0), ("-1", 0), ("three", 0)])
def test_rank_in_environment(text: str | None, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if text is not None:
        monkeypatch.setenv("RANK", text)
    assert rank_in_environment() == rank
