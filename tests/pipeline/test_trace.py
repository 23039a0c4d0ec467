"""What a timeline keeps, and the trace that is written from it."""

from __future__ import annotations

import json
import threading

import pytest

from pp_piecewise_backend.runtime.tracing import LANES, Span, Timeline, chrome_trace, wrap


def test_spans_belong_to_the_micro_batch_that_runs_unless_they_say_otherwise() -> None:
    timeline = Timeline()
    timeline.add("steps", "before any", 1)
    timeline.micro_batch = 7
    timeline.add("steps", "of this one", 3)
    timeline.add("receive", "of the next", 5, micro_batch=0)
    assert [span._replace(end_ns=0) for span in timeline.spans] == [
        Span("steps", "before any", 1, 0, None),
        Span("steps", "of this one", 3, 0, 7),
        Span("receive", "of the next", 5, 0, 0),
    ]


def test_a_span_ends_when_its_body_does_even_if_that_raises() -> None:
    timeline = Timeline()
    with pytest.raises(ArithmeticError), timeline.span("steps", "outer"):
        with timeline.span("steps", "inner"):
            pass
        raise ArithmeticError
    inner, outer = timeline.spans
    assert (inner.name, outer.name) == ("inner", "outer")
    assert outer.begin_ns <= inner.begin_ns <= inner.end_ns <= outer.end_ns


def test_a_noted_call_gives_what_the_call_gives() -> None:
    timeline = Timeline()
    divide = wrap(lambda a, b: a / b, "ppb.piece[0]", timeline)
    assert divide(6, 3) == 2
    with pytest.raises(ZeroDivisionError):
        divide(1, 0)
    assert [(span.lane, span.name) for span in timeline.spans] == [("steps", "ppb.piece[0]")] * 2


def test_threads_add_at_the_same_time() -> None:
    timeline = Timeline()

    def add(thread: int) -> None:
        for number in range(200):
            timeline.add("receive", f"{thread}", number)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(span.name for span in timeline.spans) == sorted(200 * ["0", "1", "2", "3"])


def test_spans_travel_as_text() -> None:
    timeline = Timeline()
    timeline.add("steps", 'a "name"', 10**18)
    timeline.add("send", "send", 10**18, micro_batch=2)
    assert Timeline.spans_of(timeline.to_text()) == timeline.spans


def test_a_trace_has_one_process_per_rank_and_one_thread_per_lane() -> None:
    start_ns = 1_700_000_000_000_000_000
    first = [
        Span("send", "send", start_ns + 4000, start_ns + 9500, 1),
        Span("steps", "p", start_ns + 1000, start_ns + 2000, 0),
    ]
    second = [Span("receive", "receive", start_ns + 500, start_ns + 600, None)]
    trace = json.loads(json.dumps(chrome_trace([first, second])))

    names = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    assert [e["args"]["name"] for e in names if e["name"] == "process_name"] == ["rank 0", "rank 1"]
    for rank in (0, 1):
        lanes = {e["tid"]: e["args"]["name"] for e in names if e["name"] == "thread_name" and e["pid"] == rank}
        assert lanes == dict(enumerate(LANES))
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    # In microseconds since the first span of all ranks, in the order in which they began on each rank.
    assert [(e["pid"], e["name"], LANES[e["tid"]], e["ts"], e["dur"]) for e in spans] == [
        (0, "p", "steps", 0.5, 1.0),
        (0, "send", "send", 3.5, 5.5),
        (1, "receive", "receive", 0.0, 0.1),
    ]
    assert [e["args"] for e in spans] == [{"micro_batch": 0}, {"micro_batch": 1}, {}]


def test_a_trace_of_nothing_is_a_trace() -> None:
    assert [event["ph"] for event in chrome_trace([[]])["traceEvents"]] == ["M"] * (1 + len(LANES))
