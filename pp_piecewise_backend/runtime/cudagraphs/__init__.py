"""Capture a callable, replay it. Knows no pieces, FX or programs."""
