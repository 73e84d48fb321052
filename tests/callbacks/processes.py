"""Real processes for tests: to be killed, or to train together over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# one server imports the heavy packages once; every process is forked from it in a moment
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lightning.pytorch", "transformers.models.llama.modeling_llama", "lit_prune.callbacks"])


def _child(function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        import torch

        torch.set_num_threads(1)
        try:
            function(*arguments)
        except BaseException:
            traceback.print_exc()
            file.flush()
            os._exit(1)
        file.flush()
    # a process group that is not taken down would hold the exit up
    os._exit(0)


def run(function: Callable[..., None], *arguments: Any, folder: Path, processes: int = 1) -> list[tuple[int, str]]:
    """Run a function in processes of their own, as the ranks of one run if there are several.

    Returns:
        Exit code and output of each.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "WORLD_SIZE": str(processes),
            }
        log = folder / f"log{rank}.txt"
        process = CONTEXT.Process(target=_child, args=(function, arguments, environment, log))
        process.start()
        started.append((process, log))
    deadline = time.monotonic() + 240
    for process, _ in started:
        process.join(max(0.1, deadline - time.monotonic()))
    hanging = [process.pid for process, _ in started if process.is_alive()]
    for process, _ in started:
        if process.is_alive():
            process.kill()
            process.join()
    results = [(process.exitcode, log.read_text()) for process, log in started]
    assert not hanging, f"processes hung:\n{results}"
    return results


def run_well(function: Callable[..., None], *arguments: Any, folder: Path, processes: int = 1) -> None:
    """Like :func:`run`, for what must succeed."""
    for code, output in run(function, *arguments, folder=folder, processes=processes):
        assert code == 0, output[-4000:]
