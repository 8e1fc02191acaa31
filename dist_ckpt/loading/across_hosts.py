"""A checkpoint whose files lie in folders of several hosts: which one, and who reads what of it.

The leader of each host says what its folder has. Rank 0 takes the newest checkpoint of which the
hosts that are here have all files, whichever of them has its manifest: one is put only when every
host has its share (`dist_ckpt.saving.across_hosts`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import (
    CheckpointError,
    IntegrityError,
    NotFound,
)
from dist_ckpt.format.names import (
    INDEX,
    attempt_dir,
    file_key,
    manifest_key,
)
from dist_ckpt.loading.choosing import Chooser, Chosen, LoadCall, LoadRequest
from dist_ckpt.ranks.hosts import Hosts
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.node_local import claim_folders, meet
from dist_ckpt.ranks.rounds import Topic, check_same, on_every_rank, pack, unpack
from dist_ckpt.repository import discard
from dist_ckpt.repository.history import StepMetrics, join_metrics, list_metrics
from dist_ckpt.repository.on_hosts import (
    BadCopies,
    FolderStep,
    HostsSearch,
    HostsStore,
    WatchedCheckpoint,
    is_on_all_hosts,
    lacks,
    list_folder,
)
from dist_ckpt.repository.ranking import best_step
from dist_ckpt.repository.source import Again
from dist_ckpt.storage.base import read_all

_log = logging.getLogger("dist_ckpt")


@decodable
class _Opening(msgspec.Struct, frozen=True):
    """First word of a load: what was asked for, and what a leader's folder has."""

    request: bytes
    steps: dict[int, FolderStep]
    metrics: list[StepMetrics] = []
    discards: list[tuple[int, int]] = []


@decodable
class _Asked(msgspec.Struct, frozen=True):
    """What rank 0 wants to look at next: the small files of an attempt, each sent by one rank."""

    step: int
    save_id: str
    sent_by: dict[int, list[str]]


@decodable
class _Answer(msgspec.Struct, frozen=True):
    """What rank 0 found out so far.

    Attributes:
        refused: what was passed over.
        asked: what it looks at next; None when it has chosen.
        step: the checkpoint; None where there is none.
        save_id: of the attempt that it is.
        manifest: encoded.
        index: encoded.
        small: what this host lacks of its small files, bytes by name.
        held: for each host its files, bytes by name.
        notes: what to know of files that are damaged on some host.
        discards: what any host knows as given up: steps above one, of claims below one.
    """

    refused: dict[int, str]
    asked: _Asked | None = None
    step: int | None = None
    save_id: str = ""
    manifest: bytes = b""
    index: bytes = b""
    small: dict[str, bytes] = {}
    held: list[dict[str, int]] = []
    notes: list[str] = []
    discards: list[tuple[int, int]] = []

    @property
    def folder(self) -> str:
        """Where the files of the attempt are."""
        assert self.step is not None
        return attempt_dir(self.step, self.save_id)


class HostsChooser(Chooser):
    """Chooses a checkpoint of the job's own run, in the folders of all hosts."""

    _hosts: Hosts
    _search: HostsSearch

    def __init__(self, job: Job, call: LoadCall, *, own: bool, claims: bool) -> None:
        super().__init__(job, call, own=own, claims=claims)
        self._bad = BadCopies()
        self._noted: list[str] = []

    def choose(self, topic: Topic, *, fall_back: bool) -> tuple[Chosen | None, Mapping[int, str]]:
        """See `Chooser.choose`.

        Raises:
            IntegrityError: the hosts that are here have not all of it between them; the message
                names files, who wrote them, and the newest older step that is whole.
        """
        job = self._job
        if self._claims:
            # First of all: what is chosen is the newest only if nobody else can commit any more.
            claim_folders(job, topic, job.deadline(), failed=self._call.failed)
        self._hosts = meet(job, topic, job.deadline())
        self._here: Mapping[int, FolderStep] = {}
        answer = unpack(self._begin(topic, fall_back=fall_back), _Answer)
        number = 0
        while answer.asked is not None:
            answer = unpack(self._look(topic.phase(f"look-{number}"), answer.asked), _Answer)
            number += 1
        news = {step: why for step, why in answer.refused.items() if step not in self._refused}
        self._refused = dict(answer.refused)
        # As they are in this folder: another host may have another checkpoint under that step.
        there = {step: self._here[step].manifest for step in news if step in self._here}
        self._manifests |= {step: manifest for step, manifest in there.items() if manifest}
        if self._claims and job.leads:
            # In the folder of a host that was away what is given up would count again.
            discard.spread(job.repository.store, answer.discards)
        if answer.step is None:
            return None, news
        if self._claims and job.leads:
            self._complete(answer)
        store, opens = self._store_of(answer), partial(self._open_answer, answer)
        self._tell_bad(answer)
        return Chosen(answer.step, store, self.url, answer.refused, b"", opens, answer.notes), news

    def damage(self) -> bytes:
        """See `Chooser.damage`."""
        opened = self._opened
        damaged = opened.damaged if isinstance(opened, WatchedCheckpoint) else {}
        return msgspec.msgpack.encode(damaged)

    def look_again(self, messages: Sequence[bytes]) -> Again:
        """See `Chooser.look_again`; also where another host has what is damaged on one."""
        gone = super().look_again(messages)
        if gone:
            return gone
        found = [msgspec.msgpack.decode(each, type=dict[str, str]) for each in messages]
        return "elsewhere" if self._has_others(found) else ""

    def _begin(self, topic: Topic, *, fall_back: bool) -> bytes:
        """Have all leaders say what their folders have; return the first answer."""
        job, call = self._job, self._call
        message: bytes | Exception
        try:
            request = pack(LoadRequest(call.step, "", call.fingerprint()))
            message = call.failed or pack(self._opening(request))
        except Exception as error:  # the others wait in the round
            message = error

        def decide(messages: Sequence[bytes]) -> Sequence[bytes]:
            said = [unpack(each, _Opening) for each in messages]
            check_same([unpack(each.request, LoadRequest) for each in said], "load")
            folders = [said[rank] for rank in self._hosts.leaders]
            step = call.step
            if call.best is not None:
                if not any(each.steps for each in folders):
                    raise job.repository.no_checkpoint()
                known = join_metrics(each.metrics for each in folders)
                # By the metrics of all folders: that of a host which was away lacks the newest.
                step = best_step(known, [call.best], where=self.url)
            self._search = HostsSearch(
                [each.steps for each in folders],
                self._refused,
                url=self.url,
                step=step,
                fall_back=fall_back,
                bad=self._bad,
                # Given up anywhere is given up, wherever a host was away (docs/design/013).
                discards={each for folder in folders for each in folder.discards},
            )
            return self._told(self._next())

        return job.training.round(topic.opening("choose"), message, decide, deadline=job.deadline())

    def _opening(self, request: bytes) -> _Opening:
        """Return the first word of this rank; if it leads a host, with what the folder has."""
        run = self._job.repository
        if not self._job.leads:
            # The folder is one for all ranks of the host: one of them lists it.
            return _Opening(request, {})
        self._here = list_folder(run.store, run.candidates())
        # They are in the manifests of the whole history, which is read only where they decide.
        metrics = [] if self._call.best is None else list_metrics(run.records())
        given_up = [(each.after, each.claim) for each in discard.read(run.store)]
        return _Opening(request, dict(self._here), metrics, given_up)

    def _look(self, topic: Topic, asked: _Asked) -> bytes:
        """Have rank 0 look at one attempt; return its next answer."""
        job = self._job

        def small() -> dict[str, bytes]:
            found = {}
            for name in asked.sent_by.get(job.training.rank, []):
                key = file_key(asked.step, asked.save_id, name)
                with suppress(NotFound):  # deleted meanwhile: it is missed where it is needed
                    found[name] = read_all(job.repository.store, key)
            return found

        def decide(messages: Sequence[bytes]) -> Sequence[bytes]:
            sent: dict[str, bytes] = {}
            for each in messages:
                sent |= msgspec.msgpack.decode(each, type=dict[str, bytes])
            return self._told(self._judge(sent))

        _, answer = on_every_rank(
            job.training,
            topic,
            small,
            deadline=job.deadline(),
            message=msgspec.msgpack.encode,
            decide=decide,
        )
        return answer

    def _next(self) -> _Answer:
        """Rank 0: return what to look at next, or that there is nothing to load."""
        found = self._search.next()
        if found is not None:
            sent_by = _senders(self._search.held, self._hosts.leaders)
            asked = _Asked(found.manifest.step, found.manifest.save_id, sent_by)
            return _Answer(self._search.refused, asked)
        if not self._own:
            raise self._job.repository.no_checkpoint()
        return _Answer(self._search.refused, discards=sorted(self._search.discards))

    def _judge(self, sent: Mapping[str, bytes]) -> _Answer:
        """Rank 0: take the checkpoint that is looked at if it is whole, else find the next."""
        search, checkpoint = self._search, None
        manifest, data = search.candidate.manifest, search.candidate.data
        answer = _Answer(
            search.refused,
            step=manifest.step,
            save_id=manifest.save_id,
            manifest=data,
            index=sent.get(INDEX, b""),
            small=dict(sent),
            held=search.held,
        )
        try:
            if not answer.index:
                # Nobody can say what the checkpoint consists of.
                raise lacks(manifest, search.url, [INDEX])
            checkpoint = self._open_answer(answer)
            self._note_sizes(checkpoint)
            # Asked for anew: copies that are cut short are not in it any more.
            held = search.held
            answer = msgspec.structs.replace(answer, held=held)
            looked = checkpoint.at(self._store_of(answer))
            # Of the rest files may be missing: no reason to refuse what is to be loaded.
            needed = looked.files_of(self.options.selects_stored)
            names = [looked.files[number][0] for number in needed]
            missing = [name for name in names if not any(name in each for each in held)]
            if missing:
                raise lacks(manifest, search.url, missing)
            looked.check_some(needed)
        except IntegrityError as error:
            # Rank 0 alone looks here, before the others open anything.
            damaged = {INDEX: error.message} if checkpoint is None else checkpoint.damaged
            if self._has_others([damaged]):
                # Once more without these copies. Damage is only what no host has whole.
                search.again()
            else:
                search.refuse(error)
            return self._next()
        notes = self._bad.told(manifest.save_id, self._hosts.names, looked.where)
        given_up = sorted(search.discards)
        return msgspec.structs.replace(
            answer, refused=search.take(), notes=notes, discards=given_up
        )

    def _note_sizes(self, checkpoint: WatchedCheckpoint) -> None:
        """Rank 0: take note of what is cut short on one host; on another it may be whole."""
        nbytes = dict(checkpoint.files)
        for host, held in enumerate(self._search.held):
            for name, size in held.items():
                if size != nbytes.get(name, size):
                    why = f"it holds {size} bytes, committed were {nbytes[name]}"
                    self._bad.add(checkpoint.save_id, host, name, why)

    def _has_others(self, found: Sequence[Mapping[str, str]]) -> bool:
        """Rank 0: take note of what ranks found damaged; tell whether other hosts have all that.

        Args:
            found: for each rank, from 0 on, the files and the reasons.
        """
        search, news = self._search, False
        save_id = search.candidate.manifest.save_id
        senders = _senders(search.held, self._hosts.leaders)
        sent_by = {name: rank for rank, names in senders.items() for name in names}
        held = search.held
        for rank, named in enumerate(found):
            for name, why in named.items():
                # What the host of a rank lacks was sent to it.
                has = self._hosts.of_rank[rank]
                if name == INDEX or name not in held[has]:
                    has = self._hosts.of_rank[sent_by.get(name, rank)]
                news |= self._bad.add(save_id, has, name, why)
        left = search.held
        names = {name for named in found for name in named}
        # Without news the same files would be chosen, and found damaged, for ever.
        return news and all(any(name in each for each in left) for name in names)

    def _tell_bad(self, answer: _Answer) -> None:
        if self._job.training.rank == 0:
            for note in answer.notes:
                if note not in self._noted:
                    _log.warning("%s", note)
        self._noted = answer.notes

    def _told(self, answer: _Answer) -> Sequence[bytes]:
        """Return the answer for each rank: of small files only what its host lacks."""
        if answer.step is None:
            return [pack(answer)] * len(self._hosts.of_rank)
        # Packed once for a host, not once for each of its ranks.
        by_host = [
            pack(
                msgspec.structs.replace(
                    answer, small={n: data for n, data in answer.small.items() if n not in held}
                )
            )
            for held in answer.held
        ]
        return [by_host[host] for host in self._hosts.of_rank]

    def _open_answer(self, answer: _Answer) -> WatchedCheckpoint:
        assert answer.step is not None
        store = self._store_of(answer)
        opened = WatchedCheckpoint(store, answer.manifest, answer.index, step=answer.step)
        self._opened = opened
        return opened

    def _store_of(self, answer: _Answer) -> HostsStore:
        assert answer.step is not None
        small = {answer.folder + name: data for name, data in answer.small.items()}
        here = self._here.get(answer.step)
        if here is None or here.manifest != answer.manifest:
            # Else it is looked for in the folder: retention may delete it beside a reader.
            small[manifest_key(answer.step)] = answer.manifest
        return HostsStore(
            self._job.repository.store,
            small=small,
            held=answer.held,
            of_rank=self._hosts.of_rank,
            here=self._hosts.of_rank[self._job.training.rank],
            folder=answer.folder,
        )

    def _complete(self, answer: _Answer) -> None:
        """Put the manifest where the folder of this host has a share of it, and lacks that.

        The save was cut short between the first manifest and the last. Without a manifest the
        share would be garbage after the next commit.
        """
        assert answer.step is not None
        here = self._here.get(answer.step)
        # Without a share of it nothing becomes garbage; a manifest that is there is left alone.
        if here is None or answer.save_id not in here.attempts or here.manifest or here.problem:
            return
        store = self._job.repository.store
        try:
            # The manifest last: where it is, a reader takes everything else to be there.
            for name, data in sorted(answer.small.items()):
                store.put(answer.folder + name, [data])
            store.put(manifest_key(answer.step), [answer.manifest])
        except CheckpointError as error:
            _log.warning("step %s was committed, but not in %s: %s", answer.step, store.url, error)


def _senders(held: Sequence[Mapping[str, int]], leaders: Sequence[int]) -> dict[int, list[str]]:
    """Return which leader sends which small files: those that some host lacks, and the root."""
    sent_by: dict[int, list[str]] = {}
    for name in sorted({name for each in held for name in each if is_on_all_hosts(name)}):
        # The root in any case: by it rank 0 finds out what there has to be.
        if name == INDEX or any(name not in each for each in held):
            first = next(host for host, each in enumerate(held) if name in each)
            sent_by.setdefault(leaders[first], []).append(name)
    return sent_by
