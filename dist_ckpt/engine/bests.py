"""What is watched by a metric has to be saved when it is best, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from dist_ckpt import policy
from dist_ckpt.policy import Better, SavePolicy
from dist_ckpt.repository import keep as keep_policies
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.repository.ranking import Criterion


def with_bests(
    when: SavePolicy, keep: KeepPolicy | None, stopping: Sequence[Criterion]
) -> tuple[SavePolicy, KeepPolicy | None, list[Criterion]]:
    """Let the best by every metric that is watched be saved and kept; return these metrics, too.

    Raises:
        UsageError: `keep` is no policy.
    """
    keep = keep_policies.checked(keep)
    watched = _watched(when, stopping)
    for criterion in watched:
        # The best can be rolled back to, and kept, only if it was saved.
        if criterion not in _watched(when, ()):
            when |= Better(criterion)
    if keep is not None:
        bests = [keep_policies.best(each.metric, mode=each.mode) for each in watched]
        keep = reduce(keep_policies.either, bests, keep)
    found = [*watched, *(() if keep is None else keep_policies.criteria(keep))]
    return when, keep, list(dict.fromkeys(found))


def _watched(when: SavePolicy, others: Sequence[Criterion]) -> list[Criterion]:
    """Return the metrics by which there is a best, those of early stopping first."""
    own = [each.criterion for each in policy.members(when) if isinstance(each, Better)]
    return list(dict.fromkeys([*others, *own]))
