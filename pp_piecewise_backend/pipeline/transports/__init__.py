"""Bytes between two processes. Knows no headers and no order; ``base.py`` says what a transport must do."""
