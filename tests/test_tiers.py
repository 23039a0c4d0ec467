"""A file of the default tier that costs too much fails; and as many other tests run as fit into a given time."""

from __future__ import annotations

import pytest

from checkout import TESTS
from tiers import slow_but

pytest_plugins = ["pytester"]

CONFTEST = f"""
import itertools, sys
sys.path.insert(0, {str(TESTS)!r})

from processor_seconds import FileCosts
from tiers import LEFT_OUT, TimeLimit, mark_default

def pytest_configure(config):
    for name in ("default", *LEFT_OUT):
        config.addinivalue_line("markers", name)
    config.pluginmanager.register(FileCosts(config, budget_seconds=0.4))

def pytest_collection_modifyitems(items):
    mark_default(items)
"""
USES = """
import subprocess, sys, time
import pytest

SPEND = "import time\\nwhile time.process_time() < {}: pass"

def spend(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
"""
QUICK = ("-p", "no:hypothesispytest", "-p", "no:cacheprovider", "-p", "no:randomly")


@pytest.fixture
def files(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST)
    return pytester


@pytest.mark.parametrize(
    "body",
    [
        "spend(0.5)",
        "subprocess.run([sys.executable, '-c', SPEND.format(0.5)])",
        "code = SPEND.format(0.5) + '\\nprint(flush=True); time.sleep(2)'\n"
        "    subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE).stdout.readline()",
    ],
    ids=["itself", "a child that ended", "a child that lives"],
)
def test_a_dear_file_fails(body: str, files: pytest.Pytester) -> None:
    files.makepyfile(test_dear=f"{USES}\ndef test_it():\n    {body}", test_cheap="def test_it(): pass")
    result = files.runpytest_inprocess(*QUICK)
    result.assert_outcomes(passed=2, failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "tests of the default tier in test_dear.py used * processor seconds*",
            "FAILED test_dear.py::processor_seconds*",
        ]
    )


def test_tests_outside_of_the_default_tier_may_cost_more(files: pytest.Pytester) -> None:
    files.makepyfile(
        test_some=f"{USES}\n@pytest.mark.slow\ndef test_dear():\n    spend(0.5)\n\ndef test_cheap():\n    spend(0.1)"
    )
    result = files.runpytest_inprocess(*QUICK, "--durations=2")
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["* 0.[67] test_some.py"])


def test_what_workers_spent_is_added_up(files: pytest.Pytester) -> None:
    files.makepyfile(test_dear=f"{USES}\n@pytest.mark.parametrize('n', [1, 2])\ndef test_it(n):\n    spend(0.25)")
    result = files.runpytest_subprocess("-n", "2", *QUICK)
    result.assert_outcomes(passed=2, failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_what_cannot_begin_in_time_is_skipped_and_each_order_begins_elsewhere(files: pytest.Pytester) -> None:
    files.makepyfile("import pytest\n@pytest.mark.parametrize('n', range(8))\ndef test_it(n): pass")
    began = set()
    for order in "abcd":
        limit = f"TimeLimit(1.5, {order!r}, itertools.count().__next__)"
        files.makeconftest(CONFTEST.replace("FileCosts(config, budget_seconds=0.4)", limit))
        result = files.runpytest_inprocess(*QUICK, "-rA")
        result.assert_outcomes(passed=1, skipped=7)
        began |= {line.split()[1] for line in result.outlines if line.startswith("PASSED")}
    assert len(began) > 1


def test_default_cases_must_be_cases() -> None:
    assert [getattr(case, "marks", ()) == () for case in slow_but([1], [1, 2])] == [True, False]
    with pytest.raises(AssertionError):
        slow_but([3], [1, 2])


def test_no_two_test_files_have_one_name() -> None:
    """Else pytest, which imports them as modules of that name, finds none of a run that has both."""
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
