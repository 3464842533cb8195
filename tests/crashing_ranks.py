"""Lives of examples/crash_safe_fsdp2.py: ranks of which one is killed by SIGKILL, and then, as torchrun would, all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import crash_safe_fsdp2  # found by the line above

LIMIT = 60  # seconds: a life takes one


def live(ranks: int, argv: list[str], kill: tuple[int, str, int, float] | None = None) -> tuple[list[str], str]:
    """Run the example on so many ranks, to the end or until one is killed; raises what it raised.

    Args:
        ranks: how many.
        argv: its command line.
        kill: (rank, what, n, delay): that rank is killed so many seconds after its n-th report of that.

    Returns:
        The answers of the ranks; and what the rank that was killed did at last, empty if none was.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["numpy", "torch", "torch._dynamo", "torch.distributed.fsdp", "pytest"])
    pipes: list[Any] = []
    processes = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            for rank in range(ranks):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (rank, ranks, f"{directory}/store", argv, sender)
                processes.append(context.Process(target=_run, args=arguments, daemon=True))
                processes[-1].start()
                sender.close()
                pipes.append(receiver)
            answers: dict[int, str] = {}
            count, last = 0, ""
            while len(answers) < ranks:
                ready: list[Any] = list(wait(pipes, LIMIT))
                if not ready:
                    raise AssertionError(f"no word within {LIMIT} s, behind {last}")
                for pipe in ready:
                    rank = pipes.index(pipe)
                    try:
                        kind, what = pipe.recv()
                    except EOFError:
                        raise AssertionError(f"rank {rank} ended without an answer") from None
                    if kind == "error":
                        raise AssertionError(f"rank {rank}:\n{what}")
                    if kind == "answer":
                        answers[rank] = what
                    elif kill is not None and rank == kill[0]:
                        last = what
                        count += what == kill[1]
                        if count == kill[2]:
                            time.sleep(kill[3])
                            os.kill(processes[rank].pid or 0, signal.SIGKILL)
                            processes[rank].join()
                            assert processes[rank].exitcode == -signal.SIGKILL
                            while pipe.poll():
                                try:
                                    last = pipe.recv()[1]
                                except EOFError:
                                    break
                            return [], last
            return [answers[rank] for rank in range(ranks)], ""
        finally:
            for process in processes:
                process.kill()
                process.join()


def _run(rank: int, ranks: int, store: str, argv: list[str], sender: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=dist.FileStore(store, ranks))

    def report(what: str) -> None:
        sender.send(("report", what))

    register_optimizer_step_post_hook(lambda *_: report("stepped"))
    save, replace = crash_safe_fsdp2.dcp.save, os.replace

    def slow_save(*args: Any, **kwargs: Any) -> None:
        report("saving")
        save(*args, **kwargs)
        report("saved")

    def slow_replace(*args: Any) -> None:
        replace(*args)
        report("renamed")

    crash_safe_fsdp2.dcp.save = slow_save
    crash_safe_fsdp2.os.replace = slow_replace
    try:
        sender.send(("answer", crash_safe_fsdp2.main(argv)))
    except BaseException:
        sender.send(("error", traceback.format_exc()))
    signal.pause()  # until all are done
