"""The index of a large job stays small: the bounds, and that they do not bend with the ranks."""

from __future__ import annotations

from benchmarks.scale.index import measure


def test_the_index_stays_within_its_bounds() -> None:
    few, many = measure(64, looked_at=2), measure(2048, looked_at=2)
    assert few.is_met
    assert many.is_met
    assert many.chunks > 20 * few.chunks
    # With 32 times the ranks, the root has a few numbers for each of them.
    assert many.root_bytes - few.root_bytes < 64 * 2048
    assert many.digest_bytes <= 8 * (1 << 20) / 4096 * 1.05
