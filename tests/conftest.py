"""Settings that hold for every test."""

from __future__ import annotations

from hypothesis import settings

# The same examples in every run, and no limit in time: the machine may be busy.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
