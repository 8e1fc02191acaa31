"""The ways to begin: anew, from a checkpoint of the run, from another run, from weights alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
)
from dist_ckpt.foreign.detect import named_like_one
from dist_ckpt.format.names import check_step, discard_key, parse_step_dir
from dist_ckpt.loading.loader import Loader, LoadReport
from dist_ckpt.loading.opened import place_name
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.node_local import claim_folders, meet
from dist_ckpt.ranks.rounds import on_every_rank
from dist_ckpt.repository.discard import check_first_start, gone_back_past, left_behind
from dist_ckpt.repository.history import (
    History,
    Record,
    StepMetrics,
    join_metrics,
    list_metrics,
    read_epoch_note,
)
from dist_ckpt.repository.ranking import Criterion, best_step
from dist_ckpt.repository.source import reason
from dist_ckpt.saving.saver import finish_before
from dist_ckpt.state.train_state import TrainState, main_model, parts_of, stoppers_of
from dist_ckpt.storage import Store, resolve
from dist_ckpt.training.bests import SavePolicies
from dist_ckpt.training.start import Start

FoundT = TypeVar("FoundT")
AnswerT = TypeVar("AnswerT")

_log = logging.getLogger("dist_ckpt")


@decodable
class _Newer(msgspec.Struct, frozen=True):
    """What a folder has beyond a step: all steps, and those that are pinned.

    Attributes:
        steps: ascending.
        pinned: those of them.
        hidden: whether that step itself is there, and was given up.
        is_there: whether it is there, and was not.
    """

    steps: list[int]
    pinned: list[int]
    hidden: bool
    is_there: bool


class Resumer:
    """Restores the state of one job, from wherever it is asked to.

    What `failed` is in its methods: the failure of a save that nobody was told of yet. It ends the
    restore on all ranks.

    Attributes:
        refusal: why training may not go on from what was restored last, None where it may.
    """

    def __init__(self, job: Job, state: TrainState, policies: SavePolicies) -> None:
        """Made with the Checkpointer.

        Args:
            job: the ranks, and the run.
            state: what is restored.
            policies: by the first metric of them there is a best. A job that saves by itself takes
                the run over as it restores; another one may be there to look, and takes it over
                when it first saves.
        """
        self._job = job
        self._state = state
        self._criteria = policies.criteria
        self._saves = policies.saves
        self.refusal: UsageError | None = None
        self._loader = Loader(job, state)

    def restore(
        self,
        start: Start,
        failed: Exception | None,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> LoadReport | None:
        """Restore what `start` says; None for a new run.

        Args:
            start: where training goes on from.
            failed: see the class.
            options: the keywords of `LoadOptions`.

        Raises:
            UsageError: nobody said what the best is, or the run has checkpoints that would be left
                behind; nothing was changed, and the run not taken over.
            NotFound: there is nothing to go on from.
        """
        # What the others are told if they were asked for another restore (`Board.apart`).
        self._job.calls = _in_words(start)
        try:
            return self._restore(start, failed, options or {})
        finally:
            self._job.calls = ""

    def _restore(
        self, start: Start, failed: Exception | None, options: Mapping[str, Any]
    ) -> LoadReport | None:
        finish_before(self._job)  # the newest is what this very process is still writing
        self.refusal = None
        self._job.restore_asked = True
        step = start.step
        if start.which == "best":
            step = self._best_step(failed)
            failed = None  # that round has told all ranks
        origin = -1 if begins_run(start) or step is None else step
        # What is given up is told by the number of a claim: so whoever gives up has to take one.
        claims = self._saves or _is_newest(start) or start.discard_newer
        if start.new_run or (claims and not _is_newest(start)):
            # Before the claim: whoever is refused has taken the run from nobody.
            newest = self._ask(
                # Two names, so that ranks of which only some give up find out here.
                "given up" if start.discard_newer else "newer",
                lambda: self._newer(origin),
                failed,
                kind=_Newer,
                answer=lambda found: self._check_newer(found, start, origin),
            )
            failed = None
            if newest > origin and not start.discard_newer:
                self.refusal = left_behind(self._job.url, origin, [newest])
            if start.discard_newer and self._job.owns_folders:
                topic = self._job.topic("claim", f"going back in {self._job.url}")
                claim_folders(self._job, topic, self._job.deadline(), anew=True)
        report = self._fill(start, step, claims=claims, failed=failed, options=options)
        if start.discard_newer:
            self._ask(
                "discard", lambda: self._give_up(origin), None, kind=list[int], answer=_joined
            )
        return report

    def rollback(self, failed: Exception | None) -> LoadReport:
        """Restore the models of the best checkpoint, and nothing else; the run is as it was.

        Raises:
            UsageError: nobody said by which metric, or no part is a module.
            NotFound: no checkpoint has the metric.
        """
        step = self._best_step(failed)
        models = parts_of(self._state, "model")
        nothing = UsageError(
            "rollback() restores modules and leaves the rest as it is, and no part is one "
            f"({', '.join(self._state)}): give the module itself as a part, or call "
            "load(state, url, step='best')"
        )
        report = self._loader.load(
            step,
            options={"only": models} if models else {},
            fall_back=False,
            own=False,
            failed=None if models else nothing,
        )
        assert report is not None  # this very step was asked for
        return report

    def best_values(self, criteria: Sequence[Criterion]) -> dict[Criterion, float]:
        """Rank 0: return the best values by `criteria` among the checkpoints of the run."""
        damaged = self._job.passed_over.steps  # nobody could go back to one of these
        records = [each for each in self._job.repository.records() if each.step not in damaged]
        ranked = {criterion: criterion.ranked(records) for criterion in criteria}
        return {criterion: criterion.of(found[0]) for criterion, found in ranked.items() if found}

    def record(self, step: int) -> Record | None:
        """Rank 0: what is said of a checkpoint; None, and a word in the log, when that fails."""
        try:
            # What the next manifests say of the run hangs on this: no reason to end a training.
            found = History(self._job.repository.store).read([step])
        except CheckpointError as error:
            why = reason(step, self._job.url, error.message)
            _log.warning("step %d in %s was restored, but: %s", step, self._job.url, why)
            return None
        return found[0] if found else None

    def _fill(
        self,
        start: Start,
        step: int | None,
        *,
        claims: bool,
        failed: Exception | None,
        options: Mapping[str, Any],
    ) -> LoadReport | None:
        """Fill the state with what `start` names."""
        report: LoadReport | None = None
        if start.which == "none":
            self._ask(
                "none", self._take_over if claims else int, failed, kind=int, answer=lambda _: 0
            )
            # All leaders together: the claims of all folders have one number (commit-v1, 11).
            if claims and self._job.ranks.node_local:
                topic = self._job.topic("claim", f"beginning in {self._job.url}")
                claim_folders(self._job, topic, self._job.deadline())
            self._job.go_on(None)
        else:
            skip = parts_of(self._state, "optimizer", "scheduler") if start.reset_optimizer else []
            report = self._loader.load(
                step,
                place=start.place,
                options={**options, **({"skip": skip} if skip else {})},
                # Who named a checkpoint is never given another one for it (commit-v1, section 5).
                fall_back=_is_newest(start),
                own=True,
                claims=claims,
                failed=failed,
            )
        if report is None and start.must_exist:
            raise NotFound(
                f"no checkpoint in {self._job.url} to go on from: call restore() alone, or give "
                "--auto-resume to begin where there is none",
                kind=ErrorKind.NO_CHECKPOINT,
            )
        if report is None and start.weights is not None:
            self._loader.load(
                None,
                place=start.weights,
                options={"only": [main_model(self._state)]},
                fall_back=False,
                own=True,
                claims=claims,
            )
        elif report is not None and start.place is None:
            self._hear_of_late_metrics(report)
        elif report is None and _is_newest(start) and self._job.training.rank == 0:
            self._tell_of_others()
        return report

    def _tell_of_others(self) -> None:
        """Say what lies where a run was begun, if it may be what was to be gone on from."""
        with suppress(StorageError):  # of a word only: what matters has been looked at
            name = named_like_one(self._job.repository.store)
            if name is not None:
                _log.warning(
                    "nothing in %s is a checkpoint of dist_ckpt, so the training begins anew; "
                    "to begin from %s, which another program wrote there, restore(url=...) or "
                    "load_weights it",
                    self._job.url,
                    name,
                )

    def _take_over(self) -> int:
        """Rank 0: take the run over; those in folders of several hosts all ranks take together."""
        return 0 if self._job.ranks.node_local else self._job.claim()

    def _newer(self, origin: int) -> _Newer:
        """Return what this folder has beyond `origin`."""
        repository = self._job.repository
        # Steps that this job found damaged count for nothing: they may be taken, and saved, anew.
        damaged = self._job.passed_over.steps
        there = repository.newer(origin - 1, besides=damaged)
        newer = [step for step in there if step > origin]
        pinned = [step for step in repository.pinned() if step > origin] if newer else []
        # Of a known damage the load says which.
        is_there = origin in damaged or origin in there
        return _Newer(newer, pinned, hidden=origin in repository.hidden(), is_there=is_there)

    def _check_newer(self, found: Sequence[_Newer], start: Start, origin: int) -> int:
        """Rank 0: check that no checkpoint would be left behind; return the newest one.

        A job that made them itself may go back to look, as at the end of a training.
        """
        newer = _joined(each.steps for each in found)
        if any(each.hidden for each in found):
            raise gone_back_past(self._job.url, origin)
        if origin >= 0 and not any(each.is_there for each in found):
            raise self._job.repository.not_found(origin)
        if newer and start.new_run and not start.discard_newer:
            raise UsageError(
                f"{start.new_run} begins a run, but {self._job.url} has checkpoints up to step "
                f"{newer[-1]}: give --auto-resume or --resume to go on with it, another "
                "--checkpoint-dir, or --discard-newer to give them up"
            )
        if newer and not start.discard_newer and not self._job.has_committed:
            raise left_behind(self._job.url, origin, newer)
        if newer and start.discard_newer:
            # A launcher starts a program again with the same flags: it would give up its own saves.
            check_first_start(self._job.url, newer)
        if newer and (pinned := _joined(each.pinned for each in found)):
            raise UsageError(
                f"discard_newer=True gives up what is pinned in {self._job.url}: step "
                f"{', '.join(map(str, pinned))}; unpin first, or train in another run"
            )
        if newer and start.discard_newer and not self._job.ranks.node_local:
            # Among them may be what this job saved itself. The claims in folders of several hosts
            # all leaders take together.
            self._job.claim_anew()
        return newer[-1] if newer else -1

    def _give_up(self, origin: int) -> list[int]:
        """Hide what is newer than `origin` in this folder; only now, when that is restored."""
        newer = self._job.repository.newer(origin)
        if newer or self._job.ranks.node_local:
            # Of several folders in each: what another one has is hidden there and here.
            self._job.give_up(newer, after=origin)
        if newer:
            _log.warning(
                "given up in %s: step %s; not listed any more, and deleted after the next commit; "
                "until then, deleting %s brings all of it back",
                self._job.url,
                ", ".join(map(str, newer)),
                discard_key(self._job.claim()),
            )
        return newer

    def _best_step(self, failed: Exception | None) -> int:
        """Find the best step together; of folders of several hosts, in all of them."""
        job = self._job
        return self._ask(
            "best",
            lambda: list_metrics(job.repository.records(), besides=job.passed_over.steps),
            failed,
            kind=list[StepMetrics],
            answer=lambda found: best_step(join_metrics(found), self._criteria, where=job.url),
        )

    def _hear_of_late_metrics(self, report: LoadReport) -> None:
        """Let early stopping see what became known of the checkpoint right after its save."""
        stoppers = stoppers_of(self._state)
        if not stoppers:
            return

        def late() -> dict[str, float]:
            try:
                note = read_epoch_note(self._job.repository.store, report.step, report.save_id)
            except IntegrityError as error:
                # The checkpoint itself is whole, and was restored.
                _log.warning("%s", error)
                return {}
            return {} if note is None else note.metrics

        # One look for all ranks: stoppers that heard of it on some only would stop those alone.
        metrics: dict[str, float] = self._ask(
            "late",
            late,
            None,
            kind=dict[str, float],
            answer=lambda found: {name: each[name] for each in found for name in each},
        )
        for stopper in stoppers:
            if stopper.criterion.metric in metrics:
                stopper.update(report.step, metrics[stopper.criterion.metric])

    def _ask(
        self,
        what: str,
        look: Callable[[], FoundT],
        failed: Exception | None,
        *,
        kind: type[FoundT],
        answer: Callable[[Sequence[FoundT]], AnswerT],
    ) -> AnswerT:
        """Have rank 0, or where each host has a folder the leaders of all, look into the run.

        Args:
            what: names the round.
            look: what is done there.
            failed: what keeps this rank from it.
            kind: of what that returns.
            answer: what rank 0 makes of it, for all ranks.
        """
        job = self._job
        topic = job.topic("ask", f"looking into {job.url}")
        hosts = meet(job, topic, job.deadline()) if job.ranks.node_local else None

        def work() -> bytes:
            if failed is not None:
                raise failed
            return msgspec.msgpack.encode(look()) if hosts is not None and job.leads else b""

        def decide(messages: Sequence[bytes]) -> bytes:
            if hosts is None:
                # Rank 0 alone asks the storage, as it decides: one answer for all, or one error.
                return msgspec.msgpack.encode(answer([look()]))
            said = [messages[rank] for rank in hosts.leaders]
            return msgspec.msgpack.encode(
                answer([msgspec.msgpack.decode(each, type=kind) for each in said])
            )

        _, data = on_every_rank(
            job.training,
            topic.opening(what),
            work,
            deadline=job.deadline(),
            message=bytes,
            decide=decide,
        )
        found: AnswerT = msgspec.msgpack.decode(data)
        return found


def _joined(found: Iterable[Sequence[int]]) -> list[int]:
    return sorted({step for each in found for step in each})


# What a `Start` means, and whether it means anything.


def check_start(start: Start, options: Collection[str] = ()) -> None:
    """Check that what `start` says does not contradict itself.

    Args:
        start: where training goes on from.
        options: the names of the options that say how it is loaded.

    Raises:
        UsageError: it does.
    """
    exact = start.step is not None or start.place is not None
    named = start.which in ("newest", "best", "none")
    if not named or (start.which != "newest" and exact):
        raise UsageError(
            "restore takes 'newest' or 'best' or 'none', or one of step= and url=, not "
            f"{start.which!r}, step={start.step!r}, url={start.place!r}"
        )
    if start.step is not None:
        given: object = start.step
        if isinstance(given, str):
            raise UsageError(
                f"step= is a number, not {given!r}: the newest is restored by restore(), the "
                'best by restore("best")'
            )
        check_step(start.step)
    if start.which == "none" and options:
        raise UsageError(f"restore('none') restores nothing: {', '.join(options)} say nothing")
    if start.place is not None:
        place_name(start.place)  # refuses what is none
    if not isinstance(start.discard_newer, bool):
        raise UsageError(f"discard_newer is True or False, not {start.discard_newer!r}")
    if start.discard_newer and _is_newest(start):
        raise UsageError(
            "discard_newer=True gives up what is newer than the step that is restored, and "
            "nothing is newer than the newest: name the step, 'best', or 'none'"
        )


def in_own_run(start: Start, store: Store) -> Start:
    """Return `start` with a step, or the newest, where its place lies in the run of `store` itself.

    As something from elsewhere it would be given up itself by `discard_newer`, with all the rest.

    Raises:
        UsageError: it is the run, and the newest has nothing beyond it to be given up.
    """
    place = start.place
    if place is None:
        return start
    if isinstance(place, Store):
        # Of two stores in memory the urls may be the same.
        return _newest_of_own(start) if place is store else start
    own, there = (_without_links(each.url) for each in (store, resolve(place)))
    if there == own:
        return _newest_of_own(start)
    run, _, name = there.rpartition("/")
    step = parse_step_dir(name)
    if step is None or run != own:
        return start
    return replace(start, step=step, place=None, new_run="")


def _newest_of_own(start: Start) -> Start:
    newest = replace(start, place=None, new_run="", must_exist=True)
    check_start(newest)
    return newest


def _without_links(url: str) -> str:
    """Return the url of a store as it is without links in it, where it is a path."""
    return os.path.realpath(url) if url.startswith("/") else url.rstrip("/")


def begins_run(start: Start) -> bool:
    """Whether the run itself begins, whatever the state is filled with."""
    return start.which == "none" or start.place is not None


def _is_newest(start: Start) -> bool:
    """Whether the newest checkpoint is asked for: nothing in the run is beyond it."""
    return start.which == "newest" and start.step is None and start.place is None


def _in_words(start: Start) -> str:
    """Return the call that says `start`."""
    said = [repr(start.which)] * (start.which != "newest")
    said += [f"step={start.step}"] * (start.step is not None)
    said += ["url=..."] * (start.place is not None)
    said += ["discard_newer=True"] * start.discard_newer
    said += [f"new_run={start.new_run!r}"] * bool(start.new_run)
    return f"restore({', '.join(said)})"
