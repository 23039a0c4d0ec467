"""Reasons: a code for counters and tests, a sentence for people."""

from __future__ import annotations

import pytest

from pp_piecewise_backend.utils.reasons import SENTENCES, Reason, miss


def test_every_reason_is_a_sentence() -> None:
    assert all(code == code.lower() and " " not in code for code in SENTENCES)
    assert all(sentence and not sentence.endswith(".") for sentence in SENTENCES.values())


def test_the_specific_sentence_takes_the_place_of_the_general_one() -> None:
    assert miss("random") == Reason("random", SENTENCES["random"])
    assert miss("random", "it calls dropout") == Reason("random", "it calls dropout")


def test_a_code_that_is_not_listed_is_refused() -> None:
    with pytest.raises(KeyError):
        miss("no-such-code", "a sentence")


def test_a_reason_cannot_be_changed_and_can_be_counted_by() -> None:
    with pytest.raises(AttributeError):
        miss("random").code = "guard"  # type: ignore[misc]
    assert len({miss("random"), miss("random"), miss("random", "it calls dropout")}) == 2
