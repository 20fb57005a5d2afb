"""Saved runs: their schema, and writing and reading them safely. Plain records, never a model."""
