"""The control header: what goes in comes out, and nothing else is let in."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_piecewise_backend.pipeline.header import Answer, Header, Kind
from pp_piecewise_backend.pipeline.transports.base import MESSAGE_BYTES

headers = st.builds(
    Header,
    kind=st.sampled_from(Kind),
    fingerprint=st.integers(0, 2**64 - 1),
    sequence=st.integers(0, 2**64 - 1),
    rank=st.integers(0, 2**32 - 1),
    num_tokens=st.integers(0, 2**32 - 1),
    bucket_tokens=st.integers(0, 2**32 - 1),
    tag=st.binary(max_size=24),
    answer=st.sampled_from(Answer),
)


@given(headers)
def test_what_goes_in_comes_out(header: Header) -> None:
    assert len(header.pack()) == MESSAGE_BYTES == 64
    assert Header.unpack(header.pack()) == header


@given(headers, st.integers(0, 63), st.integers(1, 255))
def test_every_changed_byte_is_refused(header: Header, at: int, change: int) -> None:
    message = bytearray(header.pack())
    message[at] ^= change
    with pytest.raises(ValueError, match=r"its header has .*, expected"):
        Header.unpack(bytes(message))


@given(st.binary(max_size=80).filter(lambda message: len(message) != 64))
def test_every_other_length_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError, match="length in bytes"):
        Header.unpack(message)


def test_a_tag_of_25_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="25 bytes"):
        Header(Kind.DATA, 0, 0, 0, tag=b"x" * 25)


def test_an_answer_that_is_none_is_refused() -> None:
    body = bytearray(Header(Kind.DATA, 0, 0, 0).pack()[:60])
    body[6] = 3
    with pytest.raises(ValueError, match="answer 3, expected one of 0, 1, 2"):
        Header.unpack(bytes(body) + zlib.crc32(body).to_bytes(4, "little"))
