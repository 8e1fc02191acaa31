"""All that is measured of large jobs: `make bench-scale`.

It ends with the number of bounds that were missed.
"""

from __future__ import annotations

import sys

from benchmarks.measure import say
from benchmarks.scale import index, planning, rounds

if __name__ == "__main__":
    missed = 0
    for heading, measure in (
        ("Rounds", rounds.main),
        ("The first plan", planning.main),
        ("The index", index.main),
    ):
        say(f"\n## {heading}\n")
        missed += measure([])
    sys.exit(missed)
