"""A throwaway Ceph cluster of one node: an S3 gateway, and a file system mounted twice.

What the tests need of a real object store and of a real network file system, on this machine
only: all daemons listen on 127.0.0.1, on ports that were free, and end with this process.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

S3_PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
FILE_SYSTEM_PROGRAMS = ("ceph-mds", "ceph-fuse")
ACCESS_KEY = "AKIDTEST"
SECRET_KEY = "SECRETSECRETSECRET"  # of a server that only this machine reaches, and not for long

_START_SECONDS = 300.0
_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1

# Not as a cluster for people would have it: no authentication, since nobody else reaches it; one
# copy of everything; quick to start. `mds_tick_interval`: at each tick the file system asks one
# mount for what another waits for, and at its default of 5 s two busy mounts wait for minutes.
_CONFIGURATION = """\
[global]
fsid={fsid}
mon_host=v2:127.0.0.1:{mon_port}
public_addr=127.0.0.1
cluster_addr=127.0.0.1
ms_bind_msgr1=false
ms_mon_client_mode=crc
auth_cluster_required=none
auth_service_required=none
auth_client_required=none
run_dir={root}
admin_socket={root}/$name.$pid.asok
crash_dir={root}/log
log_file={root}/log/$name.log
mon_cluster_log_file={root}/log/cluster.log
paxos_propose_interval=0.03
paxos_min_wait=0.01
mon_data={root}/mon
mon_data_avail_crit=1
mon_allow_pool_size_one=true
osd_pool_default_size=1
osd_pool_default_min_size=1
osd_pool_default_pg_num=8
osd_pool_default_pgp_num=8
osd_pool_default_pg_autoscale_mode=off
osd_data={root}/osd
osd_objectstore=bluestore
bluestore_block_size=21474836480
osd_memory_target=1073741824
osd_crush_chooseleaf_type=0
osd_crush_update_on_start=false
mds_tick_interval=0.1
rgw_frontends=beast endpoint=127.0.0.1:{s3_port} tcp_nodelay=1
rgw_relaxed_region_enforcement=true
rgw_dynamic_resharding=false
rgw_override_bucket_index_max_shards=1
rgw_thread_pool_size=64
rgw_enable_lc_threads=false
rgw_gc_obj_min_wait=2
rgw_gc_processor_period=5
rgw_gc_processor_max_time=5
"""


class ServiceFailed(Exception):
    """A service did not start; the message has the end of its output."""


class CephCluster:
    """A monitor, an object store daemon and an S3 gateway; on request a file system too.

    Attributes:
        endpoint: where the S3 gateway answers.
    """

    def __init__(self) -> None:
        # Sockets lie in this folder, and the path of a socket may have 107 letters.
        self._root = Path(tempfile.mkdtemp(prefix="dc-ceph-"))
        self._fsid = str(uuid.uuid4())
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._mounts: list[Path] = []
        self.endpoint = ""

    @staticmethod
    def missing(programs: Sequence[str] = S3_PROGRAMS) -> list[str]:
        """Return which of `programs` are not installed."""
        return [name for name in programs if shutil.which(name) is None]

    def start(self) -> None:
        """Start the cluster and its gateway, with one user.

        Raises:
            ServiceFailed: something did not start; nothing is left running.
        """
        try:
            self._start_objects()
            self._start_gateway()
        except BaseException:
            self.stop()
            raise

    def mount(self, count: int) -> list[Path]:
        """Make a file system and mount it `count` times, each as a host of its own would.

        Raises:
            ServiceFailed: this machine cannot mount it.
        """
        self._spawn("mds", "ceph-mds", "-f", "-i", "a")
        for pool in ("fsm", "fsd"):
            self._ceph("osd", "pool", "create", pool, "8")
        self._ceph("fs", "new", "cfs", "fsm", "fsd")
        self._wait_for("mds", lambda: "up:active" in self._ceph("mds", "stat"))
        for number in range(count):
            place = self._root / f"mount{number}"
            place.mkdir()
            self._mounts.append(place)
            self._spawn(place.name, "ceph-fuse", "-f", str(place))
        for place in self._mounts:
            self._wait_for(place.name, place.is_mount)
        return list(self._mounts)

    def stop(self) -> None:
        """Unmount, end every daemon, and remove all that they stored."""
        for place in self._mounts:
            # Lazily: a test that failed may still hold a file open.
            subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)
        for daemon in reversed(self._daemons.values()):
            with suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()
        if not any(place.is_mount() for place in self._mounts):
            shutil.rmtree(self._root, ignore_errors=True)

    def _start_objects(self) -> None:
        mon_port = free_port()
        self._endpoint_port = free_port()
        text = _CONFIGURATION.format(
            fsid=self._fsid, root=self._root, mon_port=mon_port, s3_port=self._endpoint_port
        )
        (self._root / "ceph.conf").write_text(text)
        for folder in ("mon", "osd", "log"):
            (self._root / folder).mkdir()
        monitors, address = str(self._root / "monmap"), f"[v2:127.0.0.1:{mon_port}]"
        new_map = ("--create", "--fsid", self._fsid, "--addv", "a", address, monitors)
        _run("monmaptool", *new_map)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors)
        self._spawn("mon", "ceph-mon", "-f", "-i", "a")
        self._ceph("osd", "new", self._fsid)
        self._run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", self._fsid)
        self._ceph("osd", "crush", "add", "osd.0", "1", "root=default", "host=h")
        self._spawn("osd", "ceph-osd", "-f", "-i", "0")
        self._wait_for("osd", lambda: "1 up" in self._ceph("osd", "stat"))

    def _start_gateway(self) -> None:
        self.endpoint = f"http://127.0.0.1:{self._endpoint_port}"
        self._spawn("rgw", "radosgw", "-f", "-n", "client.rgw.a")
        self._wait_for("rgw", lambda: answers(self.endpoint))
        user = ("user", "create", "--uid", "t", "--display-name", "t")
        keys = ("--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY)
        self._run("radosgw-admin", *user, *keys)

    def _spawn(self, name: str, program: str, *arguments: str) -> None:
        with (self._root / "log" / f"{name}.out").open("wb") as output:
            self._daemons[name] = spawn([program, *self._options, *arguments], output.fileno())

    def _wait_for(self, name: str, condition: Callable[[], bool]) -> None:
        try:
            wait_for(self._daemons[name], condition)
        except ServiceFailed as error:
            output = (self._root / "log" / f"{name}.out").read_text(errors="replace")
            raise ServiceFailed(f"ceph {name}: {error}: {output[-2000:]}") from None

    def _ceph(self, *arguments: str) -> str:
        return self._run("ceph", "--connect-timeout", "20", *arguments)

    def _run(self, program: str, *arguments: str) -> str:
        return _run(program, *self._options, *arguments)

    @property
    def _options(self) -> tuple[str, str]:
        return ("-c", str(self._root / "ceph.conf"))


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def spawn(command: Sequence[str], output: int) -> subprocess.Popen[bytes]:
    """Start a daemon that ends with this process, however that ends."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )


def wait_for(daemon: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds.

    Raises:
        ServiceFailed: the daemon ended, or time is up.
    """
    deadline = time.monotonic() + _START_SECONDS
    pause = threading.Event()
    while not condition():
        if daemon.poll() is not None:
            raise ServiceFailed(f"ended with exit code {daemon.returncode}")
        if time.monotonic() > deadline:
            raise ServiceFailed(f"not ready within {_START_SECONDS:.0f} s")
        pause.wait(_POLL_SECONDS)


def answers(url: str) -> bool:
    """Return whether an HTTP server answers at `url`, whatever it says."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except OSError:
        return False


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise ServiceFailed(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
