"""What threads decode is known to msgspec before any of them does."""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.arch.source import ROOT, Module, modules

# Holds live memory: nobody decodes it.
NEVER_DECODED = {"dist_ckpt.planning.describe.LocalBox"}

FIRST_USE_BY_MANY = """
import importlib, sys, threading
import msgspec

kinds = []
for line in sys.stdin.read().split():
    module, _, name = line.rpartition(".")
    kinds.append(getattr(importlib.import_module(module), name))
sys.setswitchinterval(1e-6)
for kind in kinds:
    names = kind.__struct_encode_fields__
    every = [None] * len(names) if kind.__struct_config__.array_like else dict.fromkeys(names)
    data = msgspec.msgpack.encode(every)
    barrier = threading.Barrier(4)

    def decode():
        barrier.wait()
        try:
            msgspec.msgpack.decode(data, type=kind)
        except msgspec.ValidationError:
            pass

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print("alive")
"""


def structs(module: Module) -> list[ast.ClassDef]:
    return [
        node
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef) and "msgspec.Struct" in map(ast.unparse, node.bases)
    ]


def test_classes_of_msgspec_are_known_to_it_from_the_start() -> None:
    unknown = {
        f"{module.name}.{node.name}"
        for module in modules()
        for node in structs(module)
        if "decodable" not in map(ast.unparse, node.decorator_list)
    }
    assert unknown == NEVER_DECODED


def test_threads_may_decode_a_class_first_at_once() -> None:
    """Without `decodable` the process ends by SIGSEGV."""
    names = [
        f"{module.name}.{node.name}"
        for module in modules()
        for node in structs(module)
        if f"{module.name}.{node.name}" not in NEVER_DECODED
    ]
    command = [sys.executable, "-c", FIRST_USE_BY_MANY]
    done = subprocess.run(
        command, input="\n".join(names), capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout == "alive\n", (done.returncode, done.stderr[-2000:])
