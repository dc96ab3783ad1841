"""Hypothesis draws the same examples in every run, so a failure is a failure of the change."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
