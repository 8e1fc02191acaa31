"""All that is measured of large jobs: `make bench-scale`.

It prints a verdict for each bound, writes `docs/performance.md` and its plot, and ends with the
number of bounds that were missed.
"""

from __future__ import annotations

import sys

from benchmarks.measure import say
from benchmarks.scale import index, load_rounds, loads, planning, report, requests, rounds, steady

if __name__ == "__main__":
    say("\n## Rounds\n")
    round_rows = rounds.rows([])
    say("\n## The first plan\n")
    plan_rows = planning.rows([])
    say("\n## The index\n")
    index_rows = index.rows([])
    say("\n## Saves of a known structure\n")
    steady_rows = steady.rows([])
    say("\n## Loads\n")
    load_rows = loads.rows([])
    said_rows = load_rounds.rows([])
    say("\n## Requests\n")
    measured = report.Measured(
        round_rows,
        plan_rows,
        index_rows,
        steady_rows,
        load_rows,
        said_rows,
        requests.rows([]),
    )
    found = report.verdicts(measured)
    say("\n## The bounds\n")
    for each in found:
        say(each.text)
    report.write(measured)
    sys.exit(sum(each.is_missed for each in found))
