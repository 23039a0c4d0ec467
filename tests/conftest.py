"""What every test gets: a clean environment, fixed seeds and a compiler that remembers nothing."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
# Else each process that compiles by Inductor starts another, which imports torch for the few kernels of a test.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import hypothesis
import pytest

import rank_processes
from processor_seconds import FileCosts
from tiers import TimeLimit, mark_default

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Keep pytest from listening to torch's structured trace, which is only written where someone listens.

    It takes a seventh of the time in which a test compiles.
    """
    trace = logging.getLogger("torch.__trace")
    trace.handlers[:] = [handler for handler in trace.handlers if not type(handler).__module__.startswith("_pytest.")]
    rank_processes.leave_guards_unmeasured()
    return (yield)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PP_PIECEWISE"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _fixed_seed_and_fresh_compiler() -> Iterator[None]:
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    yield
    # Otherwise programs of one test count towards the recompile limit of the next.
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture
def no_gradients() -> Iterator[None]:
    import torch

    with torch.no_grad():
        yield


@pytest.fixture
def fresh_backend() -> Iterator[None]:
    """No programs, no compiled pieces and counters at zero, before the test and after it."""
    import torch

    import pp_piecewise_backend as ppb

    torch._dynamo.reset()
    ppb.reset()
    yield
    torch._dynamo.reset()
    ppb.reset()


@pytest.fixture
def one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages have one program for every number of tokens, where their inputs allow it: see ``one_program.py``."""
    import one_program

    one_program.on(monkeypatch.setattr)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers")
    group.addoption("--begin-within", type=float, metavar="SECONDS", help="skip what could only begin later than that")
    group.addoption("--order", default="", help="with --begin-within: any text; each gives the tests another order")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(FileCosts(config))
    if config.option.begin_within is not None:
        config.pluginmanager.register(TimeLimit(config.option.begin_within, config.option.order))


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_default(items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch sees none")
