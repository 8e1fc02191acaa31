"""Runs that are interrupted, against runs that are not."""
