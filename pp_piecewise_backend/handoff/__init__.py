"""Bytes between stages: what travels, the header ahead of it, and the transports that carry both.

    links = connect(P2P(device="cpu"), StagePlan(...), Patience(silence_seconds=60))
    header = links.incoming.next_header()             # which micro-batch comes, or None at the end
    arrival = links.incoming.receive(header, stage.views(header.num_tokens))
    arrival.wait()                                    # it has landed

Start reading in ``link.py``; ``transport.py`` says what a transport must do.
"""

from .header import MAX_TAG_BYTES, Header, Kind
from .link import Links, Receiver, Sender, Transfer, connect
from .schema import Field, Plan, Schema, StagePlan
from .tensor_parallel import TensorParallel
from .transport import Patience, Pending, Transport, Wire

__all__ = [
    "MAX_TAG_BYTES",
    "Field",
    "Header",
    "Kind",
    "Links",
    "Patience",
    "Pending",
    "Plan",
    "Receiver",
    "Schema",
    "Sender",
    "StagePlan",
    "TensorParallel",
    "Transfer",
    "Transport",
    "Wire",
    "connect",
]
