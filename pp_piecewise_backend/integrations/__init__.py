"""Helpers for model libraries. Nothing here is imported by the core, and nothing is imported on its own."""
