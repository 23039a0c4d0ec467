"""The demo: a small decoder that does arithmetic, run as pipeline stages and compared with eager.

Start it with ``python -m pp_piecewise_backend demo``. It is a user of the library, not a part of its core:
nothing outside this folder and the command line imports it.
"""
