"""The settings: one frozen ``Config``, resolved from ``options=``, the environment and defaults.

This is the only module that reads environment variables, and it reads them when a ``Config`` is made.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeAlias,
    TypedDict,
    get_args,
    get_origin,
    get_type_hints,
)

from . import errors

if TYPE_CHECKING:
    from typing_extensions import Unpack

ENVIRONMENT_PREFIX = "PP_PIECEWISE"

Mode = Literal["auto", "piecewise", "full", "full_and_piecewise", "none"]
Graphs = Literal["auto", "cuda", "emulate", "off"]
Compiler = Literal["inductor", "aot_eager", "eager"]
Padding = Literal["tested", "never"]
Capture = Literal["lazy", "warmup"]
Keep = Literal["all", "if_faster"]
Source = Literal["option", "environment", "default"]
Flag: TypeAlias = "bool | Literal[0, 1] | str"


@dataclass(frozen=True)
class SplitOps:
    """Names or globs of the ops to split at, next to (or instead of) the built-in list."""

    patterns: tuple[str, ...] = ()
    extends_builtin: bool = True

    def __str__(self) -> str:
        if not self.patterns:
            return "built-in" if self.extends_builtin else "none"
        return "+" * self.extends_builtin + ",".join(self.patterns)


@dataclass(frozen=True)
class SizeRange:
    """Token counts ``first, first + step, ...`` up to and including ``last`` (None: no end).

    Raises:
        ValueError: a number is not positive, or ``last`` is not reached.
    """

    first: int
    last: int | None
    step: int = 1

    def __post_init__(self) -> None:
        if self.first < 1 or self.step < 1:
            raise ValueError(f"{str(self)!r} has a number below 1")
        if self.last is not None and self.last < self.first:
            raise ValueError(f"{str(self)!r} ends before it starts")
        if self.last is not None and (self.last - self.first) % self.step:
            raise ValueError(f"{str(self)!r} steps over its last size {self.last}")

    def __str__(self) -> str:
        if self.last == self.first and self.step == 1:
            return str(self.first)
        return f"{self.first}:{'' if self.last is None else self.last}:{self.step}"


# ------------------------------------------------------------------------- text forms of the values


@dataclass(frozen=True)
class TextForm:
    """How a field is read from a Python value or text, and written as text that reads back the same."""

    read: Callable[[object], object] = field(repr=False)
    """Raises ValueError, which may say what is wrong, for what it cannot read."""
    write: Callable[[Any], str] = field(repr=False)
    expected: str
    choices: tuple[str, ...] = ()


def _one_of(literal: Any) -> TextForm:
    choices = get_args(literal)

    def read(value: object) -> object:
        if value not in choices:
            raise ValueError
        return value

    return TextForm(read, str, f"one of {', '.join(choices)}", choices)


def _read_flag(value: object) -> bool:
    if isinstance(value, str):
        value = {"0": False, "1": True, "false": False, "true": True}.get(value.lower(), value)
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError
    return bool(value)


def _read_integer(value: object, minimum: int) -> int:
    if isinstance(value, str) and re.fullmatch("[0-9]+", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError
    return value


def _at_least(minimum: int) -> TextForm:
    return TextForm(lambda value: _read_integer(value, minimum), str, f"a whole number, at least {minimum}")


_BYTES_PER_UNIT = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def _read_bytes(value: object) -> int | None:
    if value is None or value == "unlimited":
        return None
    if isinstance(value, str) and (match := re.fullmatch("([0-9]+)([KMG]?)", value.upper())):
        value = int(match[1]) * _BYTES_PER_UNIT[match[2]]
    return _read_integer(value, minimum=0)


def _write_bytes(value: int | None) -> str:
    if value is None:
        return "unlimited"
    fitting = [unit for unit, size in _BYTES_PER_UNIT.items() if value and value % size == 0]
    unit = fitting[-1] if fitting else ""
    return f"{value // _BYTES_PER_UNIT[unit]}{unit}"


def _items(value: object) -> list[str]:
    """The items of ``"a,b"`` or of a sequence of strings; ``"none"`` and an empty sequence have none."""
    if isinstance(value, str):
        value = [] if value.strip() == "none" else [item.strip() for item in value.split(",")]
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise ValueError
    if "" in value:
        raise ValueError("a name is empty")
    return list(value)


def _read_split_ops(value: object) -> SplitOps:
    if isinstance(value, SplitOps):
        return value
    if value is None or value == "built-in":
        return SplitOps()
    patterns = _items(value)
    extends = bool(patterns) and patterns[0].startswith("+")
    if extends:
        patterns[0] = patterns[0][1:].lstrip()
    if "" in patterns or any(pattern.startswith("+") for pattern in patterns):
        raise ValueError("a '+' may only stand before the first name")
    return SplitOps(tuple(dict.fromkeys(patterns)), extends)


def _read_capture_sizes(value: object) -> tuple[SizeRange, ...]:
    if isinstance(value, str):
        value = [_read_size_range(item.strip()) for item in value.split(",")]
    if not isinstance(value, Sequence) or not value:
        raise ValueError
    ranges: list[SizeRange] = []
    for item in value:
        if isinstance(item, int) and not isinstance(item, bool):
            item = SizeRange(item, item)
        if not isinstance(item, SizeRange):
            raise ValueError(f"{item!r} is not a size")
        if ranges and (ranges[-1].last is None or ranges[-1].last >= item.first):
            raise ValueError(f"{str(item)!r} does not lie above {str(ranges[-1])!r}")
        ranges.append(item)
    return tuple(ranges)


def _read_size_range(text: str) -> SizeRange:
    match = re.fullmatch("([0-9]+)(?::([0-9]*):([0-9]+))?", text)
    if match is None:
        raise ValueError(f"{text!r} is neither 'size' nor 'first:last:step' nor 'first::step'")
    first, last, step = match.groups()
    if step is None:
        return SizeRange(int(first), int(first))
    return SizeRange(int(first), int(last) if last else None, int(step))


def _read_names(value: object) -> tuple[str, ...]:
    names = _items(value)
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"{name!r} is not a Python name")
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is named twice")
    return tuple(names)


def _read_folder(value: object) -> Path | None:
    if value is None or value == "unset":
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError
    return Path(value).expanduser()


def _write_items(items: Sequence[object]) -> str:
    return ",".join(map(str, items)) or "none"


FLAG = TextForm(_read_flag, lambda value: str(int(value)), "0, 1, true or false")
SPLIT_OPS = TextForm(
    _read_split_ops,
    str,
    "names or globs separated by commas ('a,b' replaces the built-in list, '+a,b' adds to it), 'built-in' or 'none'",
)
CAPTURE_SIZES = TextForm(
    _read_capture_sizes,
    _write_items,
    "ascending token counts such as '1,2,8:64:8,128::64', or a list of integers",
)
BYTES = TextForm(_read_bytes, _write_bytes, "a number of bytes such as 1048576, 512K, 64M or 2G, or 'unlimited'")
NAMES = TextForm(_read_names, _write_items, "argument names separated by commas, or 'none'")
PATTERNS = TextForm(lambda value: tuple(dict.fromkeys(_items(value))), _write_items, "names or globs, or 'none'")
FOLDER = TextForm(_read_folder, lambda value: "unset" if value is None else str(value), "a folder's path")


# ------------------------------------------------------------------------------------- the settings


class OptionRow(NamedTuple):
    """One field as a person reads it."""

    name: str
    environment_name: str
    value: str
    source: Source
    default: str
    help: str


class _Option(NamedTuple):
    """What a field carries besides its name, type and default."""

    form: TextForm
    help: str


class GivenOptions(TypedDict, total=False):
    """What type checkers let a `Config` be made of: the fields are more precise than what they are read from."""

    enabled: Flag
    mode: Mode
    full_max_tokens: int | str
    graphs: Graphs
    compiler: Compiler
    split_ops: SplitOps | str | Sequence[str] | None
    capture_sizes: str | Sequence[int | SizeRange]
    max_tokens: int | str
    stage_inputs: str | Sequence[str]
    row_wise_ops: str | Sequence[str]
    graph_safe_ops: str | Sequence[str]
    padding: Padding
    capture: Capture
    keep: Keep
    graph_memory_bytes: int | str | None
    strict: Flag
    static_outputs: Flag
    verify_every: int | str
    dump_dir: str | os.PathLike[str] | None


@dataclass(frozen=True, init=False, repr=False)
class Config:
    """All settings of one compiled model. Options beat the environment, which beats the defaults.

    ``Config(compiler="eager")`` and ``Config.resolve({"compiler": "eager"})`` are the same. Every value
    may be given as the Python value or as the text that the environment variable takes. Frozen, hashable
    and picklable; two configs are equal when their values are, wherever these came from.

    Raises:
        ConfigError: an unknown option or ``PP_PIECEWISE*`` variable, or a value that cannot be used.
    """

    enabled: Annotated[
        bool,
        FLAG,
        "Split and compile piecewise; 0 gives the graph to plain Inductor, untouched.",
    ] = True
    mode: Annotated[
        Mode,
        _one_of(Mode),
        "piecewise: capture the pieces between split ops; full: the whole graph; full_and_piecewise: the pieces and, "
        "up to full_max_tokens and where that is sound, all of them and what is between in one graph; auto: the same, "
        "after warmup() and where every op is known to read nothing but its arguments, else piecewise; none: split and "
        "compile only.",
    ] = "auto"
    full_max_tokens: Annotated[
        int,
        _at_least(1),
        "Largest capture size for which modes auto and full_and_piecewise make a full graph: what a decode step has.",
    ] = 512
    graphs: Annotated[
        Graphs,
        _one_of(Graphs),
        "cuda, emulate (for tests, on any device) or off; auto: cuda for CUDA tensors, off otherwise.",
    ] = "auto"
    compiler: Annotated[
        Compiler, _one_of(Compiler), "What compiles each distinct piece: inductor, aot_eager or eager."
    ] = "inductor"
    split_ops: Annotated[
        SplitOps, SPLIT_OPS, "Names or globs of ops to split at; 'a,b' replaces the built-in list, '+a,b' adds to it."
    ] = SplitOps()
    capture_sizes: Annotated[
        tuple[SizeRange, ...],
        CAPTURE_SIZES,
        "Token counts to capture graphs for, cut at max_tokens, which is always the last one.",
    ] = _read_capture_sizes("1,2,4,8:64:8,80:256:16,288:512:32,576:1024:64,1280:4096:256,4608::512")
    max_tokens: Annotated[int, _at_least(1), "Largest number of tokens of a call that runs with graphs."] = 2048
    stage_inputs: Annotated[
        tuple[str, ...],
        NAMES,
        "Names of the proxy tensors that the previous stage sends.",
    ] = ("hidden_states", "residual")
    row_wise_ops: Annotated[
        tuple[str, ...],
        PATTERNS,
        "Names or globs of custom ops in which each row of the results is made from the same row of the arguments "
        "only, besides the built-in list; pieces with any other custom op are not padded.",
    ] = ()
    graph_safe_ops: Annotated[
        tuple[str, ...],
        PATTERNS,
        "Names or globs of ops with a kernel in Python that read nothing but their arguments, besides the built-in "
        "list; any other may read what a graph would freeze, so it runs between the pieces.",
    ] = ()
    padding: Annotated[
        Padding,
        _one_of(Padding),
        "tested: pad calls where rules and tests allow it; never: only sizes that fit exactly replay.",
    ] = "tested"
    capture: Annotated[
        Capture, _one_of(Capture), "lazy: capture at the second call of a size; warmup: in warmup() only."
    ] = "lazy"
    keep: Annotated[
        Keep,
        _one_of(Keep),
        "all: keep what is captured; if_faster: warmup() times each size against the compiled pieces without graphs, "
        "and drops those that are not faster.",
    ] = "all"
    graph_memory_bytes: Annotated[
        int | None, BYTES, "Most memory that graphs may hold; the smallest capture sizes are kept first."
    ] = None
    strict: Annotated[
        bool,
        FLAG,
        "Raise an error for unmatched names, unexpected misses, late recompiles and gradients.",
    ] = False
    static_outputs: Annotated[bool, FLAG, "Return views of static memory, which the next call overwrites."] = False
    verify_every: Annotated[
        int, _at_least(0), "Compare each replay with its un-captured piece in every k-th call; 0 never does."
    ] = 0
    dump_dir: Annotated[
        Path | None,
        FOLDER,
        "Folder for FX graphs, pieces and the report, one subfolder per rank.",
    ] = None
    _sources: dict[str, Source] = field(init=False, compare=False)

    def __init__(self, /, **given_options: Unpack[GivenOptions]) -> None:
        options: Mapping[str, object] = given_options
        for name in options:
            if name not in OPTIONS:
                raise errors.ConfigError(errors.unknown_option(name, FIELD_NAMES))
        environment = _environment()
        sources: dict[str, Source] = {}
        object.__setattr__(self, "_sources", sources)
        bad_values = []
        for name, option in OPTIONS.items():
            if name in options:
                sources[name], given_as, given = "option", f"option {name!r}", options[name]
            elif name in environment:
                sources[name], given = "environment", environment[name]
                given_as = f"environment variable {environment_name(name)}"
            else:
                sources[name], given_as, given = "default", "", getattr(Config, name)
            form = option.form
            try:
                object.__setattr__(self, name, form.read(given))
            except ValueError as error:
                bad_values.append(errors.bad_value(given_as, given, form.expected, str(error), form.choices))
        if bad_values:
            raise errors.ConfigError("\n".join(bad_values))

    @classmethod
    def resolve(cls, options: Mapping[str, Any] | None = None) -> Config:
        """Make the config for the ``options=`` of ``torch.compile``; the environment is read now.

        Raises:
            ConfigError: as the constructor, or ``options`` is not a mapping.
        """
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise errors.ConfigError(errors.options_not_a_mapping(options))
        for name in options:
            if name not in OPTIONS:
                # The backend takes a Stage out of the options before they come here.
                raise errors.ConfigError(errors.unknown_option(name, (*FIELD_NAMES, "stage")))
        return cls(**options)

    @property
    def sources(self) -> Mapping[str, Source]:
        """Field name -> where its value came from."""
        return MappingProxyType(self._sources)

    def table(self) -> list[OptionRow]:
        """One row per field, with the value in effect and the default in their text form."""
        return [
            OptionRow(
                name,
                environment_name(name),
                option.form.write(getattr(self, name)),
                self._sources[name],
                option.form.write(getattr(Config, name)),
                option.help,
            )
            for name, option in OPTIONS.items()
        ]

    def cache_key(self) -> tuple[object, ...]:
        """The values that change what a compiled piece means."""
        return (self.compiler,)

    def __repr__(self) -> str:
        """Only what differs from the defaults; the whole reads back as a ``Config``."""
        values = {name: getattr(self, name) for name in OPTIONS}
        shown = [f"{name}={_shown(name, value)!r}" for name, value in values.items() if value != getattr(Config, name)]
        return f"Config({', '.join(shown)})"


OPTIONS: Mapping[str, _Option] = {
    name: _Option(*hint.__metadata__)
    for name, hint in get_type_hints(Config, include_extras=True).items()
    if get_origin(hint) is Annotated
}
FIELD_NAMES: tuple[str, ...] = tuple(OPTIONS)


def _shown(name: str, value: object) -> object:
    """The value itself where its ``repr`` is short and reads back, else its text form."""
    return OPTIONS[name].form.write(value) if isinstance(value, tuple | SplitOps) else value


def _signature() -> inspect.Signature:
    """What the constructor takes, by name, as ``help`` shows it."""
    types, kind = get_type_hints(Config), inspect.Parameter.KEYWORD_ONLY
    defaults = {name: _shown(name, getattr(Config, name)) for name in OPTIONS}
    return inspect.Signature([inspect.Parameter(n, kind, default=d, annotation=types[n]) for n, d in defaults.items()])


Config.__signature__ = _signature()  # type: ignore[attr-defined]
Config.__doc__ = "\n".join(
    [f"{inspect.getdoc(Config)}\n\nOptions:", *(f"    {n}: {o.help}" for n, o in OPTIONS.items())]
)


def environment_name(field_name: str) -> str:
    """The environment variable of a field: ``PP_PIECEWISE`` for ``enabled``, else prefixed."""
    return ENVIRONMENT_PREFIX if field_name == "enabled" else f"{ENVIRONMENT_PREFIX}_{field_name.upper()}"


def _environment() -> dict[str, str]:
    """Field name -> text of its variable, for those that are set; an unknown ``PP_PIECEWISE*`` one is an error."""
    known = {environment_name(name): name for name in FIELD_NAMES}
    given = {name: text for name, text in os.environ.items() if name.startswith(ENVIRONMENT_PREFIX)}
    for name, text in given.items():
        if name not in known:
            rest = name.removeprefix(ENVIRONMENT_PREFIX).strip("_").lower()
            near = errors.nearest(rest, FIELD_NAMES)
            likely = environment_name(near) if near else ""
            raise errors.ConfigError(errors.unknown_environment_variable(name, text, likely, list(known)))
    return {known[name]: text for name, text in given.items()}


def rank_in_environment() -> int:
    """This process's rank as launchers such as torchrun give it; 0 where there is none."""
    text = os.environ.get("RANK", "")
    return int(text) if re.fullmatch("[0-9]+", text) else 0
