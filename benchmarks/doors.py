"""Copies and exports against a plain copy of the same bytes: `python -m benchmarks.doors`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path

import obstore
import torch
from obstore.store import S3Store as ObstoreS3

import dist_ckpt
from benchmarks.local import drop_cache
from benchmarks.measure import Case, Samples, interleave, say, table, verdict
from benchmarks.s3 import environment_of
from dist_ckpt import Run
from dist_ckpt.storage import resolve
from tests.services.s3 import s3_service

TARGET = 1.25
"""How much longer they may take, verification included: 0.8 of the throughput.

An export is read back, and so moves half as many bytes again as a copy that nobody reads: it is
measured against one that is read back too, and shown against both. See docs/design/015.
"""

_MIB = 1 << 20
_TENSOR_MIB = 16
_PLAIN, _COPY, _EXPORT = "plain copy, durable", "cp", "export"
_READ_BACK = "plain copy, read back"


def main(arguments: list[str]) -> int:
    """Run what `arguments` choose; return 0 when all targets are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["local", "s3"], help="local, s3, or both")
    parser.add_argument("--place", type=Path, default=Path("build/bench-doors"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024, help="a multiple of 64")
    chosen = parser.parse_args(arguments)
    if not set(chosen.what) <= {"local", "s3"}:
        parser.error("choose from local and s3")
    measured: dict[str, Callable[[Path, int], bool]] = {
        "local": partial(_local, repeats=chosen.repeats),
        "s3": partial(_s3, repeats=chosen.repeats),
    }
    chosen.place.mkdir(parents=True, exist_ok=True)
    try:
        _save(chosen.place / "run", chosen.mib)
        met = [measured[each](chosen.place, chosen.mib * _MIB) for each in chosen.what]
    finally:
        shutil.rmtree(chosen.place, ignore_errors=True)
    return 0 if all(met) else 1


def _save(root: Path, mib: int) -> None:
    """Save weights whose sizes are no round numbers, as those of models are."""
    width = _TENSOR_MIB * _MIB // 4 // 1000
    layers = {f"layer-{n}": torch.nn.Linear(1000, width) for n in range(mib // _TENSOR_MIB)}
    dist_ckpt.save({"model": torch.nn.ModuleDict(layers), "rng": None}, root, step=1)


def _local(place: Path, nbytes: int, *, repeats: int) -> bool:
    source = place / "run"
    out = _Places(place)
    cases = [
        Case(_PLAIN, lambda: _copy_plainly(source, out.new()), before=partial(drop_cache, source)),
        Case(
            _READ_BACK,
            lambda: _read_plainly(_copy_plainly(source, out.new())),
            before=partial(drop_cache, source),
        ),
        Case(
            _COPY,
            lambda: Run(str(source)).copy(1, str(out.new())),
            before=partial(drop_cache, source),
        ),
        Case(
            _EXPORT,
            lambda: dist_ckpt.export(source, out.new() / "model.safetensors"),
            before=partial(drop_cache, source),
        ),
    ]
    cases = [Case(each.name, each.run, each.before, out.remove) for each in cases]
    return _judge("On a local disk, cold", interleave(cases, repeats=repeats), nbytes)


def _s3(place: Path, nbytes: int, *, repeats: int) -> bool:
    source = place / "run"
    files = [path for path in source.rglob("*") if path.is_file()]
    with s3_service() as service, environment_of(service):
        say(f"S3 server: {service.kind}")
        names = (f"doors-{number}" for number in count())
        used: list[str] = []
        client = ObstoreS3(
            service.bucket,
            prefix=f"{service.prefix}doors-plain",
            endpoint=service.endpoint or None,
            client_options={"allow_http": True},
            virtual_hosted_style_request=False,
        )

        def new() -> str:
            used.append(service.url(next(names)))
            return used[-1]

        def plain() -> None:
            used.append(service.url("doors-plain"))
            for path in files:
                obstore.put(client, str(path.relative_to(source)), path)

        def plain_and_back() -> None:
            plain()
            for path in files:
                for _ in obstore.get(client, str(path.relative_to(source))).stream():
                    pass

        def remove() -> None:
            while used:
                store = resolve(used.pop())
                store.delete([entry.key for entry in store.list_entries()])
                store.close()

        drop = partial(drop_cache, source)
        cases = [
            Case(_PLAIN, plain, drop, remove),
            Case(_READ_BACK, plain_and_back, drop, remove),
            Case(_COPY, lambda: Run(str(source)).copy(1, new()), drop, remove),
            Case(_EXPORT, lambda: dist_ckpt.export(source, f"{new()}/w.safetensors"), drop, remove),
        ]
        return _judge("From the disk to S3", interleave(cases, repeats=repeats), nbytes)


def _judge(title: str, samples: dict[str, Samples], nbytes: int) -> bool:
    ratios = table(title, samples, nbytes=nbytes, limits=[_PLAIN])
    met = verdict("cp against a plain copy", ratios[_COPY], target=TARGET)
    export = ratios[_EXPORT] / ratios[_READ_BACK]
    return met & verdict("export against a plain copy that is read back", export, target=TARGET)


class _Places:
    """Folders that nobody used yet, removed one by one."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._numbers = count()
        self._last = place / "none"

    def new(self) -> Path:
        self._last = self._place / f"out-{next(self._numbers)}"
        return self._last

    def remove(self) -> None:
        shutil.rmtree(self._last, ignore_errors=True)


def _read_plainly(folder: Path) -> None:
    """Read what was copied from the disk, as who checks a copy does."""
    drop_cache(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def _copy_plainly(source: Path, target: Path) -> Path:
    """Copy as the standard library does, by the kernel, and make it as durable as a store does."""
    shutil.copytree(source, target)
    paths: Sequence[Path] = [path for path in target.rglob("*") if path.is_file()]
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return target


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
