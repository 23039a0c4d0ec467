"""The settings: one frozen ``Config``, resolved from ``options=``, the environment and defaults.

This is the only module that reads environment variables, and it reads them when a ``Config`` is made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import GetCoreSchemaHandler, PrivateAttr, ValidationError
from pydantic.fields import Field, FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, core_schema
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from . import errors

ENVIRONMENT_PREFIX = "PP_PIECEWISE"

Mode = Literal["piecewise", "full", "none"]
Graphs = Literal["auto", "cuda", "emulate", "off"]
Compiler = Literal["inductor", "aot_eager", "eager"]
Padding = Literal["tested", "never"]
Capture = Literal["lazy", "warmup"]
Source = Literal["option", "environment", "default"]


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

    read: Callable[[object], object]
    write: Callable[[Any], str]
    expected: str
    choices: tuple[str, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))


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


def _at_least(minimum: int) -> TextForm:
    def read(value: object) -> int:
        if isinstance(value, str) and re.fullmatch("[0-9]+", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError
        return value

    return TextForm(read, str, f"a whole number, at least {minimum}")


_BYTES_PER_UNIT = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def _read_bytes(value: object) -> int | None:
    if value is None or value == "unlimited":
        return None
    if isinstance(value, str) and (match := re.fullmatch("([0-9]+)([KMG]?)", value.upper())):
        value = int(match[1]) * _BYTES_PER_UNIT[match[2]]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError
    return value


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
FOLDER = TextForm(_read_folder, lambda value: "unset" if value is None else str(value), "a folder's path")


# ------------------------------------------------------------------------------------- the settings


class OptionRow(NamedTuple):
    """One field as a person reads it."""

    name: str
    environment_name: str
    value: str
    source: Source
    help: str


class Config(BaseSettings):
    """All settings of one compiled model. Options beat the environment, which beats the defaults.

    ``Config(compiler="eager")`` and ``Config.resolve({"compiler": "eager"})`` are the same. Every value
    may be given as the Python value or as the text that the environment variable takes. Frozen, hashable
    and picklable; two configs are equal when their values are, wherever these came from.

    Raises:
        ConfigError: an unknown option or ``PP_PIECEWISE*`` variable, or a value that cannot be used.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    enabled: Annotated[bool, FLAG] = Field(
        True, description="Split and compile piecewise; 0 gives the graph to plain Inductor, untouched."
    )
    mode: Annotated[Mode, _one_of(Mode)] = Field(
        "piecewise",
        description="Capture the pieces between split ops, the full graph without splitting, "
        "or none (split and compile only).",
    )
    graphs: Annotated[Graphs, _one_of(Graphs)] = Field(
        "auto", description="Kind of graphs to capture; auto takes cuda for CUDA tensors and off otherwise."
    )
    compiler: Annotated[Compiler, _one_of(Compiler)] = Field(
        "inductor", description="What compiles each distinct piece."
    )
    split_ops: Annotated[SplitOps, SPLIT_OPS] = Field(
        SplitOps(),
        description="Names or globs of ops to split at; 'a,b' replaces the built-in list, '+a,b' adds to it.",
    )
    capture_sizes: Annotated[tuple[SizeRange, ...], CAPTURE_SIZES] = Field(
        _read_capture_sizes("1,2,4,8:64:8,80:256:16,288:512:32,576:1024:64,1280:4096:256,4608::512"),
        description="Token counts to capture graphs for, cut at max_tokens, which is always the last one.",
    )
    max_tokens: Annotated[int, _at_least(1)] = Field(
        2048, description="Largest number of tokens of a call that runs with graphs."
    )
    stage_inputs: Annotated[tuple[str, ...], NAMES] = Field(
        ("hidden_states", "residual"), description="Names of the proxy tensors that the previous stage sends."
    )
    padding: Annotated[Padding, _one_of(Padding)] = Field(
        "tested", description="Pad calls up to a capture size where tests show it is safe, or never."
    )
    capture: Annotated[Capture, _one_of(Capture)] = Field(
        "lazy", description="Capture at the second call of a size (lazy) or only in warmup() (warmup)."
    )
    graph_memory_bytes: Annotated[int | None, BYTES] = Field(
        None, description="Most memory that graphs may hold; the smallest capture sizes are kept first."
    )
    strict: Annotated[bool, FLAG] = Field(
        False, description="Make unmatched names, unexpected misses, late recompiles and gradients errors."
    )
    static_outputs: Annotated[bool, FLAG] = Field(
        False, description="Return views of static memory, which the next call overwrites."
    )
    verify_every: Annotated[int, _at_least(0)] = Field(
        0, description="Compare each replay with its un-captured piece in every k-th call; 0 never does."
    )
    dump_dir: Annotated[Path | None, FOLDER] = Field(
        None, description="Folder for FX graphs, pieces and the report, one subfolder per rank."
    )

    _sources: dict[str, Source] = PrivateAttr(default_factory=dict)

    def __init__(self, **options: object) -> None:
        # Checked first: BaseSettings takes keywords of its own, which are no options of ours.
        for name in options:
            if name not in FIELD_NAMES:
                raise errors.ConfigError(errors.unknown_option(name, FIELD_NAMES))
        try:
            super().__init__(**options)  # type: ignore[arg-type]
        except ValidationError as error:
            sentences = [_bad_value(detail, options) for detail in error.errors()]
            raise errors.ConfigError("\n".join(sentences)) from None
        given = self.model_fields_set
        self._sources = {
            name: "option" if name in options else "environment" if name in given else "default" for name in FIELD_NAMES
        }

    @classmethod
    def resolve(cls, options: Mapping[str, object] | None = None) -> Config:
        """Make the config for the ``options=`` of ``torch.compile``; the environment is read now.

        Raises:
            ConfigError: as the constructor, or ``options`` is not a mapping.
        """
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise errors.ConfigError(errors.options_not_a_mapping(options))
        for name in options:
            if not isinstance(name, str):
                raise errors.ConfigError(errors.unknown_option(name, FIELD_NAMES))
        return cls(**options)

    @property
    def sources(self) -> Mapping[str, Source]:
        """Field name -> where its value came from."""
        return MappingProxyType(self._sources)

    def table(self) -> list[OptionRow]:
        """One row per field, with the value in effect in its text form."""
        return [
            OptionRow(
                name,
                environment_name(name),
                _text_form(name).write(getattr(self, name)),
                self._sources[name],
                type(self).model_fields[name].description or "",
            )
            for name in FIELD_NAMES
        ]

    def cache_key(self) -> tuple[object, ...]:
        """The values that change what a compiled piece means."""
        return (self.compiler,)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Environment(settings_cls)

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in FIELD_NAMES)

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if isinstance(other, Config) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Only what differs from the defaults; the whole reads back as a ``Config``."""
        for name, field in type(self).model_fields.items():
            if (value := getattr(self, name)) != field.default:
                yield name, _text_form(name).write(value) if isinstance(value, tuple | SplitOps) else value

    def __str__(self) -> str:
        return repr(self)


FIELD_NAMES: tuple[str, ...] = tuple(Config.model_fields)


def environment_name(field_name: str) -> str:
    """The environment variable of a field: ``PP_PIECEWISE`` for ``enabled``, else prefixed."""
    return ENVIRONMENT_PREFIX if field_name == "enabled" else f"{ENVIRONMENT_PREFIX}_{field_name.upper()}"


def rank_in_environment() -> int:
    """This process's rank as launchers such as torchrun give it; 0 where there is none."""
    text = os.environ.get("RANK", "")
    return int(text) if re.fullmatch("[0-9]+", text) else 0


class _Environment(PydanticBaseSettingsSource):
    """The ``PP_PIECEWISE*`` variables as text, one per field; an unknown one is an error."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[str | None, str, bool]:
        return os.environ.get(environment_name(field_name)), field_name, False

    def __call__(self) -> dict[str, Any]:
        known = {environment_name(name): name for name in FIELD_NAMES}
        given = {name: text for name, text in os.environ.items() if name.startswith(ENVIRONMENT_PREFIX)}
        for name, text in given.items():
            if name not in known:
                rest = name.removeprefix(ENVIRONMENT_PREFIX).strip("_").lower()
                likely = environment_name(errors.nearest(rest, FIELD_NAMES))
                raise errors.ConfigError(errors.unknown_environment_variable(name, text, likely, list(known)))
        return {known[name]: text for name, text in given.items()}


def _bad_value(detail: ErrorDetails, options: Mapping[str, object]) -> str:
    name = str(detail["loc"][0])
    given_as = f"option {name!r}" if name in options else f"environment variable {environment_name(name)}"
    form = _text_form(name)
    reason = str(detail.get("ctx", {}).get("error", ""))
    return errors.bad_value(given_as, detail["input"], form.expected, reason, form.choices)


def _text_form(field_name: str) -> TextForm:
    metadata = Config.model_fields[field_name].metadata
    return next(item for item in metadata if isinstance(item, TextForm))
