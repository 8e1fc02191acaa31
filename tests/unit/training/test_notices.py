"""Notices: files that appear, and what the metadata of clouds answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from dist_ckpt.policy.ending import OnNotice
from dist_ckpt.training.trigger import NoticeWatch, SignalNote, is_first_of_host, is_noticed

TOKEN = "a-token-of-this-machine"


class Metadata(BaseHTTPRequestHandler):
    """Answers as the clouds do; what is not there is not found."""

    answers: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    token: ClassVar[str] = TOKEN

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        if self.path.startswith("/aws") and self.headers.get("X-aws-ec2-metadata-token") != TOKEN:
            self.send_error(401)
        elif self.path.startswith("/gcp") and self.headers.get("Metadata-Flavor") != "Google":
            self.send_error(403)
        elif self.path.startswith("/azure") and self.headers.get("Metadata") != "true":
            self.send_error(400)
        elif self.path not in self.answers:
            self.send_error(404)
        else:
            self._say(self.answers[self.path])

    def do_PUT(self) -> None:
        known = self.path == "/latest/api/token" and self.headers.get(
            "X-aws-ec2-metadata-token-ttl-seconds"
        )
        self._say(self.token.encode() if known else b"")

    def _say(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Say nothing."""

    def log_error(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    # A proxy would answer for another machine.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    Metadata.answers, Metadata.asked, Metadata.token = {}, [], TOKEN
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "answer", "noticed"),
    [
        ("/aws/spot/instance-action", None, False),
        ("/aws/spot/instance-action", b'{"action": "terminate", "time": "..."}', True),
        ("/gcp/instance/preempted", b"FALSE\n", False),
        ("/gcp/instance/preempted", b"TRUE\n", True),
        ("/azure/events", b'{"DocumentIncarnation": 1, "Events": []}', False),
        ("/azure/events", b'{"Events": [{"EventType": "Reboot"}, 7]}', False),
        ("/azure/events", b'{"Events": [{"EventType": "Preempt"}]}', True),
        ("/own", b"", False),
        ("/own", b"[1]", True),
    ],
)
def test_what_the_clouds_answer(
    server: str, path: str, answer: bytes | None, noticed: bool
) -> None:
    if answer is not None:
        Metadata.answers[path] = answer
    assert is_noticed(server + path) is noticed


def test_a_file(tmp_path: Path) -> None:
    place = tmp_path / "folder" / "notice"
    assert not is_noticed(str(place))
    place.parent.mkdir()
    assert not is_noticed(str(place))
    place.touch()
    assert is_noticed(str(place))
    assert not is_noticed(str(place / "below")), "a file has nothing below it"


def test_it_is_looked_for_until_it_is_there(tmp_path: Path) -> None:
    note = SignalNote([])
    watch = NoticeWatch([OnNotice(str(tmp_path / "notice"), 0.001)])
    watch.begin(note, 0)
    assert note.take() == ""
    (tmp_path / "notice").touch()
    while not (name := note.take()):
        pass
    assert name == "notice"
    watch.close()


def test_a_server_that_does_not_answer_is_said_once(
    server: str, caplog: pytest.LogCaptureFixture
) -> None:
    # It wants a token, and then refuses the one that it gave out.
    Metadata.token = "another"
    watch = NoticeWatch([OnNotice(f"{server}/aws?key=hidden", 0.001)])
    with caplog.at_level(logging.WARNING, "dist_ckpt"):
        watch.begin(SignalNote([]), 0)
        while len(Metadata.asked) < 6:
            pass
        watch.close()
    (said,) = caplog.messages
    assert "no notice can be looked for at http://127.0.0.1" in said
    assert "refuses the token" in said
    assert "hidden" not in said


@pytest.mark.parametrize(
    ("environ", "rank", "first"),
    [
        ({}, 0, True),
        ({}, 3, False),
        ({"LOCAL_RANK": "0"}, 8, True),
        ({"LOCAL_RANK": "1"}, 0, False),
        ({"SLURM_LOCALID": "0"}, 8, True),
    ],
)
def test_one_rank_of_each_host_looks(
    environ: dict[str, str], rank: int, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert is_first_of_host(rank) is first
