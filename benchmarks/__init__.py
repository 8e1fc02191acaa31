"""Measurements: ratios against limits and peers, taken in one run on one machine."""
