"""What an S3 store does when requests fail, answers are lost, and others write at the same time."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping
from typing import Any

import aiohttp
import botocore.exceptions as boto
import pytest

from dist_ckpt.errors import AlreadyExists, ErrorKind, NotFound, StorageError, UsageError
from dist_ckpt.storage import Backoff, Entry, S3Store, read_all, s3_transfer
from dist_ckpt.storage.s3_client import Client
from tests.unit.storage.fake_s3 import BUCKET, FakeS3, Fault, refusal

MIB = 1 << 20
KEY = "run/k"
LOST = boto.ConnectionClosedError(endpoint_url="http://fake")
SLOW_DOWN = refusal("SlowDown", 503)
DENIED = refusal("AccessDenied", 403, "PutObject")
LARGE = bytes(range(256)) * (12 * 4096) + b"tail"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeS3:
    fake = FakeS3()

    async def send(self: Client, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return await fake.send(name, parameters)

    monkeypatch.setattr(Client, "send", send)
    monkeypatch.setattr(Backoff, "delay", lambda *_: 0.0)
    return fake


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> list[Client]:
    """The clients of the stores that are made from here on, in their order."""
    made: list[Client] = []

    class Noted(Client):
        def __init__(self, options: Mapping[str, Any]) -> None:
            super().__init__(options)
            made.append(self)

    monkeypatch.setattr("dist_ckpt.storage.s3.Client", Noted)
    return made


@pytest.fixture
def store(fake: FakeS3) -> S3Store:
    return new_store()


def new_store(*, bucket: str = BUCKET, conditional: bool = True, **options: object) -> S3Store:
    config = {"retries": {"total_max_attempts": 3}}
    defaults = {"default_block_size": 5 * MIB, "config_kwargs": config}
    return S3Store(bucket, "run", storage_options={**defaults, **options}, conditional=conditional)


class TestCreate:
    def test_one_conditional_request_decides(self, store: S3Store, fake: FakeS3) -> None:
        store.put("k", [b"first"])
        fake.calls.clear()
        with pytest.raises(AlreadyExists, match=r"k already exists in s3://bucket/run"):
            store.put("k", [b"second"])
        assert fake.calls == ["put_object"]
        assert fake.data(KEY) == b"first"

    def test_lost_answer_of_our_own_is_no_conflict(self, store: S3Store, fake: FakeS3) -> None:
        fake.faults = [Fault("put_object", LOST, after=True)]
        store.put("k", [b"mine"])
        assert fake.data(KEY) == b"mine"
        assert store.retries >= 1

    def test_every_answer_lost_but_stored(self, store: S3Store, fake: FakeS3) -> None:
        store.put("before", [b"."])
        fake.calls.clear()
        fake.faults = [Fault("put_object", LOST, nth=nth, after=True) for nth in (1, 2, 3)]
        store.put("k", [b"mine"])
        assert fake.data(KEY) == b"mine"

    def test_equal_bytes_of_another_writer_are_a_conflict(
        self, store: S3Store, fake: FakeS3
    ) -> None:
        """The mark of an attempt decides, not its bytes: one of two equal writers has lost."""
        new_store().put("k", [b"equal"])
        fake.calls.clear()
        fake.faults = [Fault("put_object", SLOW_DOWN)]
        with pytest.raises(AlreadyExists):
            store.put("k", [b"equal"])

    def test_not_stored_is_an_error(self, store: S3Store, fake: FakeS3) -> None:
        fake.faults = [Fault("put_object", LOST, nth=0)]
        with pytest.raises(StorageError, match="put k in s3://bucket/run"):
            store.put("k", [b"mine"])
        assert fake.calls == ["put_object"] * 3 + ["head_object"]
        assert fake.objects == {}

    def test_what_will_not_change_is_asked_once(self, store: S3Store, fake: FakeS3) -> None:
        fake.faults = [Fault("put_object", DENIED, nth=0)]
        with pytest.raises(StorageError, match="s3:PutObject") as caught:
            store.put("k", [b"mine"])
        assert caught.value.kind == ErrorKind.PERMISSION
        assert fake.calls == ["put_object"]

    def test_server_that_ignores_conditions_is_found_out(
        self, store: S3Store, fake: FakeS3
    ) -> None:
        fake.ignores_conditions = True
        with pytest.raises(StorageError, match=r"If-None-Match.*single_writer=True"):
            store.put("k", [b"."])
        assert fake.objects == {}

    def test_conditions_are_tried_once(self, store: S3Store, fake: FakeS3) -> None:
        for number in range(3):
            store.put(f"k{number}", [b"."])
        assert fake.calls.count("put_object") == 4

    def test_outage_in_between_leaves_what_was_created(self, store: S3Store, fake: FakeS3) -> None:
        fake.faults = [Fault("put_object", LOST, nth=nth) for nth in (2, 3, 4)]
        store.put("k", [b"."])
        assert fake.data(KEY) == b"."
        store.put("l", [b"."])
        store.put("m", [b"."])
        assert fake.calls.count("put_object") == 4 + 2 + 1

    def test_without_conditions_it_looks_first(self, fake: FakeS3) -> None:
        fake.ignores_conditions = True
        store = new_store(conditional=False)
        assert not store.capabilities.atomic_create
        store.put("k", [b"first"])
        with pytest.raises(AlreadyExists):
            store.put("k", [b"second"])
        assert fake.calls == ["head_object", "put_object", "head_object"]
        assert fake.data(KEY) == b"first"

    def test_server_that_knows_no_conditions(self, store: S3Store, fake: FakeS3) -> None:
        fake.faults = [Fault("put_object", refusal("NotImplemented", 501), nth=0)]
        with pytest.raises(UsageError, match="single_writer=True"):
            store.put("k", [b"."])
        assert fake.calls == ["put_object"]


class TestParts:
    def test_parts_are_cut_across_buffers(self, store: S3Store, fake: FakeS3) -> None:
        view = memoryview(LARGE)
        store.put("k", [view[:7], view[7 : 6 * MIB], view[6 * MIB :]])
        assert fake.data(KEY) == LARGE
        assert fake.calls.count("upload_part") == 3
        assert fake.uploads == {}

    def test_one_part_needs_no_upload_of_parts(self, store: S3Store, fake: FakeS3) -> None:
        store.put("k", [bytes(5 * MIB)])
        assert "create_multipart_upload" not in fake.calls

    def test_existing_key_is_looked_for_first(self, store: S3Store, fake: FakeS3) -> None:
        store.put("k", [b"first"])
        fake.calls.clear()
        with pytest.raises(AlreadyExists):
            store.put("k", [LARGE])
        assert fake.calls == ["head_object"]
        store.put("k", [LARGE], mode="replace")
        assert fake.data(KEY) == LARGE

    def test_created_by_another_in_the_meantime(self, store: S3Store, fake: FakeS3) -> None:
        fake.faults = [Fault("head_object", refusal("404", 404))]
        new_store().put("k", [b"first"])
        with pytest.raises(AlreadyExists):
            store.put("k", [LARGE])
        assert fake.data(KEY) == b"first"
        assert fake.uploads == {}

    @pytest.mark.parametrize("name", ["upload_part", "complete_multipart_upload"])
    @pytest.mark.parametrize("error", [LOST, SLOW_DOWN, DENIED])
    def test_failure_aborts(
        self, store: S3Store, fake: FakeS3, name: str, error: Exception
    ) -> None:
        fake.faults = [Fault(name, error, nth=0)]
        with pytest.raises(StorageError):
            store.put("k", [LARGE])
        assert fake.objects == {}
        assert fake.uploads == {}

    @pytest.mark.parametrize("name", ["upload_part", "complete_multipart_upload"])
    def test_one_lost_answer_is_no_failure(self, store: S3Store, fake: FakeS3, name: str) -> None:
        fake.faults = [Fault(name, LOST, after=True)]
        store.put("k", [LARGE])
        assert fake.data(KEY) == LARGE
        assert fake.uploads == {}

    def test_every_answer_of_the_end_lost(self, store: S3Store, fake: FakeS3) -> None:
        fake.faults = [Fault("complete_multipart_upload", LOST, after=True)]
        fake.faults += [Fault("complete_multipart_upload", SLOW_DOWN, nth=n) for n in (2, 3)]
        store.put("k", [LARGE])
        assert fake.data(KEY) == LARGE

    @pytest.mark.parametrize("lost", [1, 3])
    def test_uploads_whose_names_were_lost_are_aborted(
        self, store: S3Store, fake: FakeS3, lost: int
    ) -> None:
        theirs = {"Key": KEY, "parts": {1: (b"", fake.now)}, "begun": fake.now}
        fake.uploads = {"theirs": theirs, "next": {**theirs, "Key": KEY + "2", "parts": {}}}
        fake.faults = [
            Fault("create_multipart_upload", LOST, nth=nth + 1, after=True) for nth in range(lost)
        ]
        if lost == 3:
            with pytest.raises(StorageError):
                store.put("k", [LARGE])
        else:
            store.put("k", [LARGE])
        # What has parts is somebody's who is at work, and so is what has another key.
        assert list(fake.uploads) == ["theirs", "next"]

    def test_object_of_another_size_is_an_error(self, store: S3Store, fake: FakeS3) -> None:
        complete = fake.complete_multipart_upload

        async def shorten(asked: dict[str, Any]) -> dict[str, Any]:
            answer = await complete(asked)
            fake.objects[KEY].data = fake.objects[KEY].data[:-1]
            return answer

        fake.complete_multipart_upload = shorten  # type: ignore[method-assign]
        with pytest.raises(StorageError, match="bytes were stored"):
            store.put("k", [LARGE])
        assert fake.objects == {}


class TestRead:
    @pytest.fixture(autouse=True)
    def small_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """So that `LARGE` is read by several requests."""
        monkeypatch.setattr(s3_transfer, "PIECE_BYTES", 4 * MIB)

    @pytest.mark.parametrize("cuts", [[0], [1, 2], [3 * MIB, 0]])
    def test_goes_on_where_it_broke_off(
        self, store: S3Store, fake: FakeS3, cuts: list[int]
    ) -> None:
        store.put("k", [LARGE])
        fake.cuts = list(cuts)
        found = bytearray(len(LARGE))
        assert store.read_into("k", 0, memoryview(found)) == len(LARGE)
        assert found == LARGE
        assert fake.cuts == []
        assert store.retries == len(cuts)

    def test_truncated_each_time(self, store: S3Store, fake: FakeS3) -> None:
        store.put("k", [b"0123456789"])
        fake.cuts = [1] * 3
        with pytest.raises(StorageError, match="did not arrive"):
            store.read_into("k", 0, memoryview(bytearray(10)))

    @pytest.mark.parametrize("then", [LARGE[::-1], LARGE[:MIB], b"", LARGE + b"more"])
    def test_replaced_while_it_is_read(
        self, store: S3Store, fake: FakeS3, then: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All bytes are of one version."""
        store.put("k", [LARGE])
        get = fake.get_object

        async def replacing(asked: dict[str, Any]) -> dict[str, Any]:
            answer = await get(asked)
            if fake.calls.count("get_object") == 1:
                fake.objects[KEY].data = then
            return answer

        monkeypatch.setattr(fake, "get_object", replacing)
        target = bytearray(len(LARGE))
        count = store.read_into("k", 0, memoryview(target))
        assert target[:count] == then[: len(LARGE)]

    def test_replaced_again_and_again(
        self, store: S3Store, fake: FakeS3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.put("k", [LARGE])
        get = fake.get_object

        async def replacing(asked: dict[str, Any]) -> dict[str, Any]:
            fake.objects[KEY].data = bytes([len(fake.calls) % 256]) * len(LARGE)
            return await get(asked)

        monkeypatch.setattr(fake, "get_object", replacing)
        with pytest.raises(StorageError, match="what else writes to it"):
            store.read_into("k", 0, memoryview(bytearray(len(LARGE))))

    def test_missing_bucket_is_not_a_missing_key(self, fake: FakeS3) -> None:
        store = new_store(bucket="another")
        with pytest.raises(StorageError, match="create the bucket first"):
            store.size("k")
        with pytest.raises(StorageError, match="create the bucket first"):
            store.put("k", [b"."])

    def test_missing_key_costs_one_request_once_the_bucket_is_known(
        self, store: S3Store, fake: FakeS3
    ) -> None:
        for _ in range(2):
            with pytest.raises(NotFound, match=r"no object k in s3://bucket/run"):
                store.size("k")
        assert fake.calls == ["head_object", "list_objects_v2", "head_object"]

    def test_bare_refusal_is_explained(self, store: S3Store, fake: FakeS3) -> None:
        """A look at a key is refused without a reason; a listing tells."""
        fake.faults = [
            Fault("head_object", refusal("403", 403, "HeadObject"), nth=0),
            Fault("list_objects_v2", refusal("SignatureDoesNotMatch", 403, "ListObjectsV2")),
        ]
        with pytest.raises(StorageError, match=r"SignatureDoesNotMatch.*secret"):
            store.size("k")
        with pytest.raises(StorageError, match="s3:GetObject and s3:ListBucket"):
            store.size("k")


class TestOthers:
    def test_pages_of_a_listing(self, store: S3Store, fake: FakeS3) -> None:
        for number in range(5):
            store.put(f"d/{number}", [bytes(number)])
        fake.objects["run/d/"] = fake.objects["run/d/0"]  # the marker of a folder
        found = [Entry(f"d/{number}", number) for number in range(5)]
        assert list(store.list_entries("d/")) == found
        fake.faults = [Fault("list_objects_v2", DENIED, nth=5)]
        with pytest.raises(StorageError):
            list(store.list_entries("d/"))

    def test_deletes_many(self, store: S3Store, fake: FakeS3) -> None:
        template = new_store()
        template.put("x", [b"."])
        fake.objects |= {f"run/d/{n}": fake.objects["run/x"] for n in range(1500)}
        store.delete(f"d/{n}" for n in range(1500))
        assert list(fake.objects) == ["run/x"]
        assert fake.calls.count("delete_objects") == 2
        assert "delete_object" not in fake.calls

    def test_what_fails_among_many_is_deleted_by_itself(self, store: S3Store, fake: FakeS3) -> None:
        for key in ("a", "b", "c"):
            store.put(key, [b"."])
        fake.undeletable = {"run/b"}
        store.delete(["a", "b", "c"])
        assert not fake.objects
        assert [call for call in fake.calls if "delete" in call] == [
            "delete_objects",
            "delete_object",
        ]

    @pytest.mark.parametrize(
        "error", [refusal("NotImplemented", 501), refusal("MissingContentMD5", 400), DENIED]
    )
    def test_server_that_deletes_no_more_than_one(
        self, store: S3Store, fake: FakeS3, error: Exception
    ) -> None:
        fake.faults = [Fault("delete_objects", error)]
        for _ in range(2):
            for key in ("a", "b"):
                store.put(key, [b"."])
            store.delete(["a", "b"])
            assert not fake.objects
        assert fake.calls.count("delete_objects") == 1

    def test_failed_delete(self, store: S3Store, fake: FakeS3) -> None:
        refused = refusal("AccessDenied", 403, "DeleteObject")
        fake.faults = [Fault("delete_objects", refused), Fault("delete_object", refused, nth=2)]
        with pytest.raises(StorageError, match=r"delete a and 2 more.*s3:DeleteObject"):
            store.delete(["a", "b", "c"])

    def test_sweep_aborts_what_had_no_part_for_long(self, fake: FakeS3) -> None:
        store = new_store(abandoned_seconds=3600)
        fake.uploads = {
            "alone": {"Key": "run/a/k", "parts": {}, "begun": fake.now},
            "busy": {"Key": "run/a/k", "parts": {1: (b"", fake.now)}, "begun": fake.now},
            "elsewhere": {"Key": "other/k", "parts": {}, "begun": fake.now},
        }
        assert store.sweep() == 0
        fake.pass_time(3000)
        fake.uploads["busy"]["parts"][2] = (b"", fake.now)
        fake.pass_time(3000)
        assert store.sweep("b/") == 0
        assert store.sweep("a/") == 1
        assert list(fake.uploads) == ["busy", "elsewhere"]

    def test_sweep_takes_only_what_may_go(self, fake: FakeS3) -> None:
        keys = {"dead": "run/a/dead", "live": "run/a/live", "odd": "run/a//b", "root": "run/"}
        fake.uploads = {
            name: {"Key": key, "parts": {}, "begun": fake.now} for name, key in keys.items()
        }
        asked: list[str] = []

        def may_go(key: str) -> bool:
            asked.append(key)
            return key == "a/dead"

        assert new_store(abandoned_seconds=0).sweep(may_go=may_go) == 1
        assert sorted(fake.uploads) == ["live", "odd", "root"]
        assert asked == ["a/dead", "a/live"], "what is no key of a store is nobody's of ours"

    @pytest.mark.parametrize("knows_condition", [True, False])
    def test_deletes_exactly_what_was_read(
        self, store: S3Store, fake: FakeS3, knows_condition: bool
    ) -> None:
        fake.ignores_conditions = not knows_condition
        store.put("k", [b"good"], mode="replace")
        assert not store.delete_exactly("k", b"damaged")
        assert not store.delete_exactly("none", b"damaged")
        assert fake.data("run/k") == b"good"
        assert store.delete_exactly("k", b"good")
        assert "run/k" not in fake.objects

    def test_server_refuses_to_delete_what_came_after_the_look(
        self, store: S3Store, fake: FakeS3
    ) -> None:
        store.put("k", [b"damaged"])
        fake.before_delete = lambda: new_store().put("k", [b"good"], mode="replace")
        assert not store.delete_exactly("k", b"damaged")
        assert fake.data("run/k") == b"good"

    def test_server_without_conditional_deletes_is_asked_without(
        self, store: S3Store, fake: FakeS3
    ) -> None:
        store.put("k", [b"damaged"])
        fake.faults = [Fault("delete_object", refusal("NotImplemented", 501))]
        assert store.delete_exactly("k", b"damaged")
        assert "run/k" not in fake.objects

    def test_sweep_meets_an_upload_that_just_ended(self, fake: FakeS3) -> None:
        fake.uploads = {"x": {"Key": "run/k", "parts": {}, "begun": fake.now}}
        fake.faults = [Fault("list_parts", refusal("NoSuchKey", 404))]
        assert new_store(abandoned_seconds=0).sweep() == 0

    def test_travels_to_another_process_without_connections(self, store: S3Store) -> None:
        store.put("k", [b"."])
        there = copy.deepcopy(store)  # by way of what a pickle would hold
        assert there.url == store.url
        assert there.retries == 0
        assert read_all(there, "k") == b"."
        there.close()

    def test_repr_and_url_hold_no_secret(self) -> None:
        store = new_store(key="AKID", secret="hunter2")
        assert "hunter2" not in repr(store) + store.url


class TestClient:
    def test_stall_is_an_error_in_bounded_time(
        self, fake: FakeS3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def hang(*_: object) -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        monkeypatch.setattr(fake, "send", hang)
        config = {"read_timeout": 0.02, "retries": {"max_attempts": 1}}
        store = new_store(config_kwargs=config)
        for operation in (
            lambda: store.put("k", [b"."]),
            lambda: store.read_into("k", 0, memoryview(bytearray(1))),
            lambda: store.size("k"),
        ):
            with pytest.raises(StorageError, match="does not answer") as caught:
                operation()
            assert caught.value.kind == ErrorKind.TIMEOUT
        assert store.retries == 3

    def test_throttling_lowers_what_is_under_way(
        self, clients: list[Client], store: S3Store, fake: FakeS3
    ) -> None:
        fake.faults = [Fault("head_object", SLOW_DOWN)]
        store.put("k", [b"."])
        assert store.size("k") == 1
        assert clients[0].session().gate.limit.limit < 10

    def test_expired_credentials_are_looked_up_again(
        self,
        clients: list[Client],
        store: S3Store,
        fake: FakeS3,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        renewed: list[int] = []

        async def renew(_: object, connection: int) -> None:
            renewed.append(connection)

        store.put("k", [b"."])
        monkeypatch.setattr(type(clients[0].session()), "renew", renew)
        fake.faults = [Fault("head_object", refusal("ExpiredToken", 400))]
        assert store.size("k") == 1
        assert renewed == [0]

    def test_credentials_are_looked_up_once_for_all(self, clients: list[Client]) -> None:
        store = S3Store(BUCKET, storage_options={"anon": True})
        session = clients[0].session()

        async def expire() -> list[int]:
            await session.connected(None, "head_object")
            before = session.connection
            await asyncio.gather(*(session.renew(before) for _ in range(5)))
            return [before, session.connection]

        assert clients[0].run(expire) == [1, 2]
        store.close()

    @pytest.mark.parametrize(
        "error",
        [aiohttp.ClientPayloadError(), ConnectionResetError(), TimeoutError(), LOST, SLOW_DOWN],
    )
    def test_what_may_pass_is_repeated(
        self, store: S3Store, fake: FakeS3, error: Exception
    ) -> None:
        store.put("k", [b"data"])
        fake.calls.clear()
        fake.faults = [Fault("get_object", error), Fault("get_object", error, nth=2)]
        assert store.read_into("k", 0, memoryview(bytearray(9))) == 4
        assert fake.calls == ["get_object"] * 3

    def test_wrong_options_are_named(self) -> None:
        for options in ({"config_kwargs": {"nonsense": 1}}, {"key": "a", "username": "b"}):
            store = S3Store(BUCKET, storage_options=options)
            with pytest.raises(UsageError, match="storage_options"):
                store.list_children()

    def test_profile_that_does_not_exist(self) -> None:
        store = S3Store(BUCKET, storage_options={"profile": "no-such-profile"})
        with pytest.raises(UsageError, match="no-such-profile"):
            store.list_children()

    def test_no_credentials(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        store = S3Store(BUCKET, storage_options={"endpoint_url": "http://127.0.0.1:1"})
        with pytest.raises(StorageError, match=r"AWS_ACCESS_KEY_ID.*anon=True") as caught:
            store.put("k", [b"."])
        assert caught.value.kind == ErrorKind.PERMISSION
        store.close()

    def test_nobody_there(self) -> None:
        options = {
            "endpoint_url": "http://127.0.0.1:1",
            "anon": True,
            "config_kwargs": {"retries": {"total_max_attempts": 1}},
        }
        store = S3Store(BUCKET, storage_options=options)
        with pytest.raises(StorageError, match="check the endpoint"):
            store.size("k")
        store.close()
