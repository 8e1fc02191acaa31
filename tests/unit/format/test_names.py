from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dist_ckpt.errors import UsageError
from dist_ckpt.format import names

SAVE_ID = "c000003-0123456789abcdef"


@given(st.integers(0, 10**10 - 1))
def test_a_step_directory_is_read_back(step: int) -> None:
    assert names.parse_step_dir(names.step_dir(step)) == step


@given(st.text(alphabet="step-0123456789 \n\u0663x/.", max_size=20))
@example("step-0000000001\n")
@example("step-\u0660000000001")
@example("step-1")
@example("step-00000000001")
def test_what_parses_as_a_step_directory_is_what_is_written(name: str) -> None:
    step = names.parse_step_dir(name)
    assert step is None or names.step_dir(step) == name


@pytest.mark.parametrize("step", [-1, 10**10, True, 1.0, "1", None])
def test_what_is_no_step_is_refused(step: int) -> None:
    with pytest.raises(UsageError, match="step"):
        names.check_step(step)


def test_the_keys_are_those_of_the_run_layout() -> None:
    assert names.step_dir(1000) == "step-0000001000"
    assert names.manifest_key(1000) == "step-0000001000/manifest.json"
    assert names.index_key(7, SAVE_ID) == f"step-0000000007/{SAVE_ID}/index.msgpack"
    shard = names.shard_name("model", 12)
    assert shard == "model.r00012.safetensors"
    assert names.file_key(7, SAVE_ID, shard) == f"step-0000000007/{SAVE_ID}/{shard}"
    assert names.claim_key(3) == "claims/000003.json"


@pytest.mark.parametrize(
    ("save_id", "file_name"),
    [
        ("..", "index.msgpack"),
        ("c3-0123456789abcdef", "index.msgpack"),
        (SAVE_ID + "\n", "index.msgpack"),
        (SAVE_ID, "../manifest.json"),
        (SAVE_ID, "manifest.json"),
        (SAVE_ID, "model.r0.safetensors"),
        (SAVE_ID, ""),
    ],
)
def test_a_file_key_is_made_of_names_that_dist_ckpt_writes(save_id: str, file_name: str) -> None:
    with pytest.raises(UsageError):
        names.file_key(1, save_id, file_name)


@given(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", fullmatch=True),
    st.integers(0, 10**5 - 1),
    st.integers(0, 10**5 - 1),
)
@example("extra", 0, 0)
def test_a_shard_name_is_read_back(part: str, rank: int, number: int) -> None:
    name = names.shard_name(part, rank, number=number)
    assert names.parse_shard_name(name) == (part, rank, number)
    assert names.is_attempt_file(name)


def test_only_further_files_of_a_part_say_their_number() -> None:
    assert names.shard_name("model", 3, number=0) == "model.r00003.safetensors"
    assert names.shard_name("model", 3, number=12) == "model.r00003-00012.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "model.r00000.safetensors.tmp",
        "model.r000000.safetensors",
        "../model.r00000.safetensors",
        "a/b.r00000.safetensors",
        "1.r00000.safetensors",
        "model.r00000-00000.safetensors",
        "model.r00000-1.safetensors",
        "model.r00000-000001.safetensors",
        "model.r00000-.safetensors",
        "model.r00000.safetensors\n",
        ".tmp-123",
        "",
    ],
)
def test_a_foreign_file_is_nobodys_shard(name: str) -> None:
    assert names.parse_shard_name(name) is None
    assert not names.is_attempt_file(name)


def test_the_index_is_an_attempt_file() -> None:
    assert names.is_attempt_file("index.msgpack")


@pytest.mark.parametrize("rank", [-1, 10**5, True])
def test_a_rank_without_a_name_is_refused(rank: int) -> None:
    with pytest.raises(UsageError, match="rank"):
        names.shard_name("model", rank)


@pytest.mark.parametrize("number", [-1, 10**5, True])
def test_more_files_than_have_names_are_refused(number: int) -> None:
    with pytest.raises(UsageError, match="file number"):
        names.shard_name("model", 0, number=number)


@pytest.mark.parametrize("part", ["", "1a", "a.b", "a/b", "..", "x" * 65, "ä", "a\n", "extra"])
def test_what_is_no_part_is_refused(part: str) -> None:
    assert not names.is_part(part)
    with pytest.raises(UsageError, match="part"):
        names.check_part(part)


@pytest.mark.parametrize("part", ["model", "_x", "A-1", "x" * 64])
def test_a_part_is_returned(part: str) -> None:
    assert names.check_part(part) == part


@given(st.integers(0, 10**6 - 1))
def test_claims_and_save_ids_are_read_back(claim: int) -> None:
    assert names.parse_claim(names.claim_key(claim).removeprefix("claims/")) == claim
    assert names.parse_save_id(names.new_save_id(claim)) == claim


def test_two_attempts_have_two_save_ids() -> None:
    assert len({names.new_save_id(1) for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "name", ["3.json", "000003", "000003.json.bak", "0000003.json", "-00003.json"]
)
def test_a_foreign_file_is_no_claim(name: str) -> None:
    assert names.parse_claim(name) is None


@pytest.mark.parametrize("claim", [-1, 10**6, False])
def test_a_claim_without_a_name_is_refused(claim: int) -> None:
    with pytest.raises(UsageError, match="claim"):
        names.claim_key(claim)
    with pytest.raises(UsageError, match="claim"):
        names.new_save_id(claim)


def test_a_whole_tensor_bears_its_own_name() -> None:
    assert names.chunk_name("layers.0.weight", None) == "layers.0.weight"
    assert names.chunk_name("layers.0.weight", (128, 0)) == "layers.0.weight#128,0"
    assert names.chunk_name("a#0", None) == "a##0"


CHUNKS = st.tuples(
    st.text(alphabet="#0,a", max_size=6),
    st.none() | st.lists(st.integers(0, 20), min_size=1, max_size=3).map(tuple),
)


@given(CHUNKS, CHUNKS)
@example(("a#", (0,)), ("a", (0,)))
@example(("a#0", None), ("a", (0,)))
def test_different_chunks_have_different_names(
    one: tuple[str, tuple[int, ...] | None], other: tuple[str, tuple[int, ...] | None]
) -> None:
    assert (names.chunk_name(*one) == names.chunk_name(*other)) == (one == other)


@pytest.mark.parametrize("name", ["__metadata__", "lone \ud800"])
@pytest.mark.parametrize("offsets", [None, (0,)])
def test_a_tensor_that_safetensors_cannot_name_is_refused(
    name: str, offsets: tuple[int] | None
) -> None:
    with pytest.raises(UsageError, match="rename"):
        names.chunk_name(name, offsets)


def test_a_box_has_offsets() -> None:
    with pytest.raises(UsageError, match="whole tensor"):
        names.chunk_name("scalar", ())
