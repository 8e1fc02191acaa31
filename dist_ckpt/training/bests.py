"""What is watched by a metric has to be saved when it is best, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from dist_ckpt import policy
from dist_ckpt.policy import Better, SavePolicy
from dist_ckpt.repository import keep as keep_policies
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.state.early_stopping import EarlyStopping


@dataclass(frozen=True, slots=True)
class SavePolicies:
    """When a Checkpointer saves and what it keeps, with the best by every metric that is watched.

    Attributes:
        when: when to save.
        keep: what to keep, None for all.
        criteria: by which metrics there is a best.
        said: whether anybody said when to save, were it never.
        stoppers: what is fed with the metrics that are told.
    """

    when: SavePolicy
    keep: KeepPolicy | None
    criteria: Sequence[Criterion]
    said: bool
    stoppers: Sequence[EarlyStopping]

    @classmethod
    def of(
        cls,
        when: SavePolicy | None,
        every_steps: int | None,
        keep: KeepPolicy | None,
        stoppers: Sequence[EarlyStopping],
    ) -> SavePolicies:
        """Return what the arguments of a Checkpointer come to.

        Raises:
            UsageError: `every_steps` is no positive integer.
        """
        given = policy.checked_when(when)
        if every_steps is not None:
            given |= policy.every(every_steps)
        criteria = [stopper.criterion for stopper in stoppers]
        all_of, kept, watched = with_bests(given, keep, criteria)
        said = when is not None or bool(policy.members(all_of))
        return cls(all_of, kept, watched, said=said, stoppers=stoppers)

    @property
    def saves(self) -> bool:
        """Whether a save can ever be due, as `step` and `epoch_end` are called."""
        return bool(policy.members(self.when))


def with_bests(
    when: SavePolicy, keep: KeepPolicy | None, stopping: Sequence[Criterion]
) -> tuple[SavePolicy, KeepPolicy | None, list[Criterion]]:
    """Let the best by every metric that is watched be saved and kept; return these metrics, too.

    Raises:
        UsageError: `keep` is no policy.
    """
    keep = keep_policies.checked_keep(keep)
    watched = _watched(when, stopping)
    for criterion in watched:
        # The best can be rolled back to, and kept, only if it was saved.
        if criterion not in _watched(when, ()):
            when |= Better(criterion)
    # Without a policy everything is kept, the best among it.
    if keep is not None:
        bests = [keep_policies.best(each.metric, mode=each.mode) for each in watched]
        keep = reduce(keep_policies.either, bests, keep)
    found = [*watched, *(() if keep is None else keep_policies.criteria(keep))]
    return when, keep, list(dict.fromkeys(found))


def _watched(when: SavePolicy, others: Sequence[Criterion]) -> list[Criterion]:
    """Return the metrics by which there is a best, those of early stopping first."""
    own = [each.criterion for each in policy.members(when) if isinstance(each, Better)]
    return list(dict.fromkeys([*others, *own]))
