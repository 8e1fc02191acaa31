"""All ranks open one checkpoint: rank 0 finds it, the others are told which it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import CheckpointError, ErrorKind, IntegrityError, NotFound
from dist_ckpt.foreign.source import ForeignSource
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.names import check_step
from dist_ckpt.loading.opened import (
    Location,
    check_is_run,
    find_detached,
    find_foreign,
    locate,
    place_name,
)
from dist_ckpt.options import LoadOptions
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.node_local import claim_folders
from dist_ckpt.ranks.rounds import Topic, check_same, pack, unpack
from dist_ckpt.repository import Checkpoint, Repository
from dist_ckpt.repository.checkpoint import reread, unless_deleted
from dist_ckpt.repository.commit import read_manifest
from dist_ckpt.repository.detached import DetachedStep
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.repository.source import Again, Source, listed
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.resolve import Place, resolve

Which: TypeAlias = int | Criterion | None
"""Which checkpoint of a run: its step, the best by a criterion, None for the newest."""


@dataclass(frozen=True, slots=True)
class LoadCall:
    """What one rank was asked to load.

    Attributes:
        step: which checkpoint, None for the newest, or the best one.
        best: by what it is the best; None where the best is not asked for.
        place: where from; None for the run of the job.
        url: how messages name that place; empty for None.
        options: how.
        failed: what keeps this rank from loading.
    """

    step: int | None
    place: Place | None
    url: str
    options: LoadOptions
    failed: Exception | None
    best: Criterion | None = None
    whole: Callable[[], Collection[str]] = tuple  # see `dist_ckpt.foreign.names.sort_into_parts`

    @classmethod
    def of(
        cls,
        which: Which,
        place: Place | None,
        keywords: Mapping[str, Any] | None,
        failed: Exception | None,
    ) -> LoadCall:
        """Check the arguments; what is wrong with them is kept, for all ranks to hear."""
        url, options = "", LoadOptions()
        best = which if isinstance(which, Criterion) else None
        step = None if isinstance(which, Criterion) else which
        try:
            options = LoadOptions.of(keywords or {})
            url = "" if place is None else place_name(place)
            step = None if step is None else check_step(step)
        except Exception as error:
            failed = failed or error
        return cls(step, place, url, options, failed, best)

    def fingerprint(self) -> dict[str, str]:
        """Return all but step and url as text that is equal on ranks which mean the same."""
        return {"best": str(self.best), **self.options.fingerprint()}


@dataclass(frozen=True, slots=True)
class Chosen:
    """The checkpoint to load, as rank 0 named it.

    Attributes:
        step: its step; 0 where another program wrote it and does not say.
        store: where this rank finds it.
        url: its run, or its directory where another program wrote it.
        refused: newer checkpoints that were passed over, each with the reason.
        token: what this rank is to find there, if that is not known of all ranks.
        open: opens it on this rank, which is to be told to the others if it fails.
        notes: what else to know of it, though nothing is wrong.
    """

    step: int
    store: Store
    url: str
    refused: Mapping[int, str]
    token: bytes
    open: Callable[[], Source]
    notes: Sequence[str] = ()


@decodable
class LoadRequest(msgspec.Struct, frozen=True):
    """First word of a load.

    Attributes:
        step: what this rank was asked to load, None for the newest.
        url: where from.
        options: how, each option as text.
    """

    step: int | None
    url: str
    options: dict[str, str] = {}


@decodable
class _Answer(msgspec.Struct, frozen=True):
    """What rank 0 chose, for the other ranks: what they need to find it, and to know it.

    Attributes:
        step: None where there is no checkpoint.
        text: from what its store is to be resolved.
        digest: of the manifest, which vouches for the root, and that for everything.
        refused: what was passed over.
        foreign: the description of a checkpoint that another program wrote; it has no manifest.
        detached: whether its store is one step directory.
        token: see `Job.place_token`.
    """

    step: int | None
    text: str | None = None
    digest: str = ""
    refused: dict[int, str] = {}
    foreign: bytes = b""
    detached: bool = False
    token: bytes = b""


class Chooser:
    """Chooses a checkpoint together with the other ranks, once or until one is whole."""

    def __init__(self, job: Job, call: LoadCall, *, own: bool, claims: bool) -> None:
        """Take this rank's call.

        Args:
            job: the ranks, and the run that `own` is about.
            call: what to load.
            own: whether to choose none, not raise, when the run of the job has no checkpoint.
            claims: whether to take that run over first.
        """
        self.url = call.url or job.url
        self.options = call.options
        self._job = job
        self._call = call
        self._own = own
        self._claims = claims
        self._refused: dict[int, str] = {}
        self._manifests: dict[int, bytes] = {}
        self._opened: Source | None = None

    def choose(self, topic: Topic, *, fall_back: bool) -> tuple[Chosen | None, Mapping[int, str]]:
        """Return the checkpoint, None for a new run, and what was newly refused; a round.

        Args:
            topic: names the load.
            fall_back: whether a damaged one is passed over for the next older one.

        Raises:
            CheckpointError: the same on every rank; see `dist_ckpt.loading.choosing.choose`.
            UsageError: the ranks were asked for different things.
        """
        call = self._call
        if self._claims and self._job.ranks.node_local:
            claim_folders(self._job, topic, self._job.deadline(), failed=call.failed)
        request = call.failed or pack(LoadRequest(call.step, self.url, call.fingerprint()))

        def decide(messages: Sequence[bytes]) -> bytes:
            # Before the run is taken over: ranks that mean different things take it from nobody.
            check_same([unpack(data, LoadRequest) for data in messages], "load")
            return msgspec.msgpack.encode(self._decide(fall_back=fall_back))

        data = self._job.training.round(
            topic.opening("choose"), request, decide, deadline=self._job.deadline()
        )
        answer = msgspec.msgpack.decode(data, type=_Answer)
        news = {step: why for step, why in answer.refused.items() if step not in self._refused}
        self._refused = dict(answer.refused)
        if answer.step is None:
            return None, news
        store = self._store(answer)
        opens = partial(self._open, store, answer)
        return Chosen(answer.step, store, self.url, answer.refused, answer.token, opens), news

    def refuse(self, step: int, reason: str) -> None:
        """Take note that the data of `step` is damaged; all ranks do so together."""
        self._refused[step] = reason
        if isinstance(self._opened, Checkpoint) and self._opened.step == step:
            self._manifests[step] = self._opened.manifest_bytes

    def damage(self) -> bytes:
        """Return what this rank says in `look_again`."""
        return b""

    def look_again(self, messages: Sequence[bytes]) -> Again:
        """Rank 0: tell why not to give up what was chosen, by what each rank says of its damage."""
        try:
            there = self._opened is None or self._opened.still_there()
        except CheckpointError:
            there = True  # nobody knows: then what was found is damage
        return "" if there else "gone"

    def passed_over(self) -> dict[int, bytes | None]:
        """Return the steps that were refused, on rank 0 with their manifests."""
        return {step: self._manifests.get(step) for step in self._refused}

    def _decide(self, *, fall_back: bool) -> _Answer:
        """Rank 0: take the run over if that is wanted, find the checkpoint, open it."""
        if self._call.place is None:
            # First of all: what is chosen is the newest only if nobody else can commit any more.
            return self._find(self._take_over(), fall_back=fall_back)
        # Another place may have none, and then the run is taken from nobody.
        answer = self._find(b"", fall_back=fall_back)
        return msgspec.structs.replace(answer, token=self._take_over())

    def _take_over(self) -> bytes:
        """Rank 0: take the run over if that is wanted; return what others are to find there."""
        if not self._claims:
            return b""
        self._job.claim()
        return self._job.place_token()

    def _find(self, token: bytes, *, fall_back: bool) -> _Answer:
        # Whatever else lies in a run, its checkpoints come first.
        choice, location = self._choose(self._location(), fall_back=fall_back)
        self._opened = opened = choice.checkpoint  # to decode millions of chunks twice is felt
        if opened is not None:
            return _Answer(
                opened.step,
                location.text,
                bytes_digest(opened.manifest_bytes),
                choice.refused,
                detached=location.detached,
                token=token,
            )
        if self._own and self._call.place is None:
            return _Answer(None)
        self._opened = foreign = find_foreign(location, whole=self._call.whole())
        # It may have no digests that would tell later that a file is cut short.
        foreign.check_sizes()
        return _Answer(foreign.step, location.text, foreign=foreign.message, token=token)

    def _choose(self, location: Location, *, fall_back: bool) -> tuple[Choice, Location]:
        """Return the checkpoint of the run there, or the one that lies there by itself."""
        if location.file is not None:
            return Choice(None), location
        choice, absent = Choice(None), None
        try:
            choice = self._choose_step(location, fall_back=fall_back)
        except NotFound as error:
            absent = error
        detached = None if choice.checkpoint is not None else self._detached(location)
        if detached is not None:
            return self._choose_step(detached, fall_back=False), detached
        if absent is not None:
            raise absent
        return choice, location

    def _choose_step(self, location: Location, *, fall_back: bool) -> Choice:
        run = Repository(location.store)
        step = location.step
        if self._call.best is not None and step is None:
            step = run.best(self._call.best)
        selects = self.options.selects_stored
        ranks = self._job.training.world_size
        choice = choose(
            run, step, self._refused, fall_back=fall_back, selects_part=selects, ranks=ranks
        )
        self._manifests |= choice.manifests
        return choice

    def _detached(self, location: Location) -> Location | None:
        # The run of the job is one, whatever lies in it; and the best is one of several.
        if self._call.place is None or self._call.best is not None:
            return None
        return find_detached(location)

    def _location(self) -> Location:
        if self._call.place is None:
            return Location(self._job.repository.store, self._call.step)
        location = locate(self._call.place, self._call.step)
        if self._call.best is not None:
            check_is_run(location)
        return location

    def _open(self, store: Store, answer: _Answer) -> Source:
        job = self._job.training
        if job.rank and answer.foreign:
            return ForeignSource(store, answer.foreign)
        if job.rank:
            assert answer.step is not None
            self._opened = open_told(store, answer.step, answer.digest)
        assert self._opened is not None
        if isinstance(self._opened, Checkpoint):
            # In the round `fits`: what is missing is damage to all ranks, which choose again.
            check_share(self._opened, self.options.selects_stored, job.rank, job.world_size)
        return self._opened

    def _store(self, answer: _Answer) -> Store:
        if self._opened is not None and self._job.training.rank == 0:
            return self._opened.store
        place = self._call.place
        if place is None:
            return self._job.repository.store
        # By what rank 0 found it to be: the others need not look whether it is a run or a step.
        store = place if isinstance(place, Store) else resolve(answer.text or "")
        return DetachedStep(store, answer.step or 0) if answer.detached else store


# Which checkpoint to load: rank 0 decides.


@dataclass(frozen=True)
class Choice:
    """A checkpoint, as rank 0 opened it.

    Attributes:
        checkpoint: opened, None when the run has none.
        refused: newer checkpoints that were passed over, each with the reason.
        manifests: of those that were found damaged here, as they were read.
    """

    checkpoint: Checkpoint | None
    refused: dict[int, str] = field(default_factory=dict)
    manifests: dict[int, bytes] = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """Its step, None when the run has none."""
        return None if self.checkpoint is None else self.checkpoint.step


def choose(
    repository: Repository,
    step: int | None,
    refused: Mapping[int, str],
    *,
    fall_back: bool,
    selects_part: Callable[[str], bool] = lambda _: True,
    ranks: int = 1,
) -> Choice:
    """Open `step`, or the newest checkpoint that is not in `refused`.

    Args:
        repository: the run.
        step: which one, None for the newest.
        refused: steps already found to be damaged, with the reasons.
        fall_back: whether a damaged one is passed over for the next older one.
        selects_part: tells of a stored part whether anything of it is to be loaded; a lost file of
            the others is no reason to refuse.
        ranks: how many load it; sizes that they look at together (`shares_sizes`) are left to them.

    Raises:
        NotFound: no such step.
        IntegrityError: the checkpoint is damaged and may not be passed over, or all are damaged.
        IncompatibleError: it was written by a newer format; that is no damage to pass over.
    """
    if step is not None:
        # Who asks for this very step is given no other one for it (commit-v1, section 5).
        return Choice(reread(lambda: checked(repository.open(step), selects_part, ranks)))
    reasons = dict(refused)
    manifests: dict[int, bytes] = {}
    # One by one: a run on an object store would be asked about each of its steps otherwise.
    for candidate in repository.newest_now():
        # Damage may show when tensors are read, on any rank: then the choice is made again.
        if candidate in reasons:
            continue
        look = partial(_look, repository.store, candidate, selects_part, ranks, manifests)
        try:
            checkpoint = reread(look)
        except IntegrityError as error:
            if not fall_back:
                raise
            reasons[candidate] = error.message
        except NotFound:
            # Never committed, or deleted since the listing, by retention or by hand. That is no
            # damage: what came meanwhile is looked for before anything older is taken.
            manifests.pop(candidate, None)
        else:
            # Of damaged ones it is kept: who saves such a step anew knows it by these bytes.
            del manifests[candidate]
            return Choice(checkpoint, reasons, manifests)
    if reasons:
        raise IntegrityError(
            f"no checkpoint in {repository.store.url} can be restored, and a training that began "
            f"anew there would in time take their place ({listed(reasons, repository.store.url)}). "
            "Nothing was changed: bring back a copy of what is damaged, or begin a run elsewhere",
            kind=ErrorKind.MALFORMED,
        )
    return Choice(None)


def _look(
    store: Store, step: int, selects: Callable[[str], bool], ranks: int, manifests: dict[int, bytes]
) -> Checkpoint:
    """Open `step`, and keep its manifest as it was read, whatever comes of it."""
    manifests[step] = read_manifest(store, step)
    return checked(Checkpoint.open(store, manifests[step], step=step), selects, ranks)


def open_told(store: Store, step: int, digest: str) -> Checkpoint:
    """Open the checkpoint that rank 0 named, by its own look at it.

    Raises:
        IntegrityError: it is damaged, or not found here, or not the one that rank 0 opened.
    """
    where = f"step {step} in {store.url}"
    try:
        manifest_bytes = read_manifest(store, step)
        if bytes_digest(manifest_bytes) != digest:
            raise IntegrityError(
                f"{where}: its manifest is not the one that rank 0 read: was it saved anew "
                "meanwhile, or is another host's folder there?",
                kind=ErrorKind.MISSING_FILE,
            )
        return Checkpoint.open(store, manifest_bytes, step=step)
    except NotFound as error:
        # As damage: so all ranks look again together, and take what there is by then.
        raise IntegrityError(
            f"{where}: rank 0 opened it, and it is not found here: was it deleted meanwhile, or do "
            "the hosts not share the place?",
            kind=ErrorKind.MISSING_FILE,
        ) from error


# The sizes of very many files are looked at by all ranks of a load, each of them at some.


MANY_FILES = 1000
"""How many files of a checkpoint rank 0 looks at alone, at most."""


class _Sized(Source, Protocol):
    """A checkpoint whose files have committed sizes; `Checkpoint` has them all."""

    @property
    def files(self) -> Sequence[tuple[str, int]]: ...

    def check_parts(self, selects_part: Callable[[str], bool]) -> None: ...

    def check_some(self, files: Sequence[int]) -> None: ...


_SizedT = TypeVar("_SizedT", bound=_Sized)


def shares_sizes(checkpoint: _Sized, selects_part: Callable[[str], bool], ranks: int) -> bool:
    """Tell whether all ranks of a load look at sizes, each of them at some.

    There are so many files that the others would wait for the listing of rank 0; and all are
    wanted, so that nobody has to read what describes them to find out which.
    """
    many = ranks > 1 and len(checkpoint.files) > MANY_FILES
    return many and all(map(selects_part, checkpoint.parts))


def checked(checkpoint: _SizedT, selects: Callable[[str], bool], ranks: int) -> _SizedT:
    """Return `checkpoint`, its sizes compared unless ranks share that; see `shares_sizes`.

    Raises:
        NotFound: it was deleted meanwhile.
        IntegrityError: a file is missing, shorter or longer.
    """
    # Sizes are cheap to ask for: a truncated file is found before any tensor is touched.
    if not shares_sizes(checkpoint, selects, ranks):
        with unless_deleted(checkpoint):
            checkpoint.check_parts(selects)
    return checkpoint


def check_share(checkpoint: _Sized, selects: Callable[[str], bool], rank: int, ranks: int) -> None:
    """Compare the sizes of the files that `rank` looks at, where all ranks do; see `shares_sizes`.

    Raises:
        IntegrityError: a file is missing, shorter or longer.
    """
    if shares_sizes(checkpoint, selects, ranks):
        checkpoint.check_some(range(rank, len(checkpoint.files), ranks))
