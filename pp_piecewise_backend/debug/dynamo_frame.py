"""What Dynamo made of the frame that is being compiled: its bytecode as depyf decompiles it, and its guards.

depyf is asked for text only. ``depyf.prepare_debug`` would patch torch and run its own decompiled code instead.
"""

from __future__ import annotations

import dis
import re
import weakref
from collections.abc import Callable
from types import CodeType

from .. import errors
from ..utils import torch_compat
from .summary import Extras

GUARDS = "guards.txt"
TRANSFORMED_CODE = "transformed_code.py"

_MOST_INSTRUCTIONS = 3_000
"""depyf's time grows with the square of the number: 1 s at 1,500 [ran]."""


class FrameWriter:
    """Writes two files about the frame, each once Dynamo has what is in it.

    Args:
        write: takes the name of a file and its text.
    """

    def __init__(self, write: Callable[[str, str], None]) -> None:
        self._write = write
        self.extras = Extras()
        """What came of it so far; grows."""
        frame = torch_compat.frame_being_compiled()
        self._code: CodeType | None = None if frame is None else frame[0]
        # Dynamo lets go of a program once nobody holds the code that calls it.
        self._transformed: weakref.ref[CodeType] | None = None
        if self._code is not None:
            torch_compat.when_bytecode_is_ready(self._code, self._write_bytecode)

    def write_guards(self) -> None:
        """Dynamo has them once it is done with the frame, and drops them at its reset."""
        transformed = None if self._transformed is None else self._transformed()
        if self._code is None or transformed is None or GUARDS in self.extras.files:
            return
        guards = torch_compat.guards_of(self._code, transformed)
        if guards is not None:
            self._write(GUARDS, _flat(guards))
            self.extras.files.append(GUARDS)

    def _write_bytecode(self, transformed: CodeType) -> None:
        self._transformed = weakref.ref(transformed)
        try:
            self._write(TRANSFORMED_CODE, decompile(transformed))
            self.extras.files.append(TRANSFORMED_CODE)
        except Exception as error:
            self.extras.problems.append(errors.depyf_failed(TRANSFORMED_CODE, error))


def _flat(guards: str) -> str:
    """One line per guard, without the tree of objects that they hang on and where they come from."""
    lines = (re.sub(r"^[| ]*\+- |\s+# .*", "", line) for line in guards.splitlines() if "GuardManager: " not in line)
    return "\n".join(line for line in lines if line.strip()) + "\n"


def decompile(code: CodeType) -> str:
    """Python source with the meaning of the bytecode that Dynamo runs in place of the frame's."""
    import depyf

    count = sum(1 for _ in dis.get_instructions(code))
    if count > _MOST_INSTRUCTIONS:
        raise ValueError(errors.too_long_to_decompile(count, _MOST_INSTRUCTIONS))
    # depyf keeps what it is given for good, and Dynamo keeps a program as long as the code that calls it lives [ran].
    return depyf.decompile(code.replace())
