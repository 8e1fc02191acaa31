"""A training as a job of Ray: one torchrun on each of its nodes, and the training is as ever.

    NNODES=2 python train_on_ray.py train_gpt.py \
        --checkpoint-dir s3://my-bucket/runs/gpt --auto-resume --parallel fsdp

torchrun has the workers, so that they are processes of their own with a main thread: only there
does Python take signals. When a node is lost, all begin anew on those that Ray then has, from the
newest whole checkpoint.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

NNODES = int(os.environ.get("NNODES", "2"))
CPUS_PER_NODE = int(os.environ.get("CPUS_PER_NODE", "1"))
GPUS_PER_NODE = int(os.environ.get("GPUS_PER_NODE", "0"))
MAX_RESTARTS = int(os.environ.get("MAX_RESTARTS", "20"))
PORT = 29400

log = logging.getLogger("train_on_ray")


def address() -> str:
    """Return that of the node where this is called."""
    return str(ray.util.get_node_ip_address())


def run_node(index: int, first: str, name: str, program: list[str]) -> None:
    """Run the torchrun of node number `index` to its end; they meet at the address `first`.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={NNODES}"]
    command += [f"--nproc-per-node={GPUS_PER_NODE or 1}", "--max-restarts=3", f"--rdzv-id={name}"]
    # Said, as not every host finds its own address by its name.
    command += ["--rdzv-backend=c10d", f"--rdzv-conf=is_host={int(index == 0)}"]
    command += [f"--rdzv-endpoint={first}:{PORT}", *program]
    # Without it torch hands restarted workers the addresses of those that died.
    variables = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(command, env=variables)
    try:
        status = process.wait()
    except BaseException:
        # Cancelled, as another node is lost: torchrun lets its workers end.
        process.terminate()
        process.wait()
        raise
    if status:
        raise subprocess.CalledProcessError(status, command)


def run_once(nodes: PlacementGroup, name: str, program: list[str]) -> None:
    """Run the training on `nodes`, one torchrun each.

    Raises:
        ray.exceptions.RayError: it failed on a node, or the node is lost; it was ended on all.
    """

    def on(index: int) -> dict[str, object]:
        place = PlacementGroupSchedulingStrategy(nodes, placement_group_bundle_index=index)
        share = {"num_cpus": CPUS_PER_NODE, "num_gpus": GPUS_PER_NODE, "max_retries": 0}
        return {"scheduling_strategy": place, **share}

    first = ray.get(ray.remote(address).options(**on(0)).remote())
    runner = ray.remote(run_node)
    running = [
        runner.options(**on(index)).remote(index, first, name, program) for index in range(NNODES)
    ]
    left = list(running)
    try:
        while left:
            done, left = ray.wait(left)
            ray.get(done)
    finally:
        for each in left:
            ray.cancel(each)
        ray.wait(running, num_returns=len(running))


def main(program: list[str]) -> None:
    """Run `program`, a training and its arguments, until it ends well.

    Raises:
        ray.exceptions.RayError: it failed once more than MAX_RESTARTS says.
    """
    ray.init()
    bundle = {"CPU": CPUS_PER_NODE, **({"GPU": GPUS_PER_NODE} if GPUS_PER_NODE else {})}
    for restart in range(MAX_RESTARTS + 1):
        nodes = placement_group([bundle] * NNODES, strategy="SPREAD")
        ray.get(nodes.ready())
        try:
            run_once(nodes, f"training-{restart}", program)
            return
        except ray.exceptions.RayError:
            if restart == MAX_RESTARTS:
                raise
            log.exception("restart %d of %d", restart + 1, MAX_RESTARTS)
        finally:
            remove_placement_group(nodes)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: train_on_ray.py PROGRAM [ARGUMENT ...]")
    logging.basicConfig(level=logging.INFO)
    main(sys.argv[1:])
