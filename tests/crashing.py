"""Lives of examples/crash_safe.py: processes that tell what they do, and are killed by SIGKILL meanwhile.

A fork server has torch imported, so that a life begins in some 50 ms instead of seconds.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import crash_safe  # found by the line above

LIMIT = 60  # seconds: a life takes a fraction of one
SLACK = 30  # reports
PIECES = 8  # of a checkpoint, as it is written
PAUSE = 0.001  # seconds between them: so writing takes longer than the steps between two checkpoints


@dataclass
class Life:
    """What a process reported, in order, and how it ended."""

    reports: list[str] = field(default_factory=list)
    answer: str = ""  # the digest, if it came to its end
    status: int | None = None

    @property
    def was_killed(self) -> bool:
        return self.status == -signal.SIGKILL


def live(argv: list[str], stop_at: tuple[str, int] | None = None, kill_behind: tuple[int, float] | None = None) -> Life:
    """Run the example in a new process, to its end or until it is killed; raises what it raised.

    Args:
        argv: its command line.
        stop_at: (what, n): with its n-th report of that, it stands still, and is killed.
        kill_behind: (n, delay): it is killed that many seconds after its n-th report, whatever it does then.
    """
    if kill_behind is not None:
        stop_at = ("anything", kill_behind[0] + SLACK)  # if this process is kept from killing it in time
    context = multiprocessing.get_context("forkserver")
    # Any optimizer imports torch._dynamo, and any process that multiprocessing starts imports what its parent ran.
    context.set_forkserver_preload(["numpy", "torch", "torch._dynamo", "pytest"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(argv, sender, stop_at), daemon=True)
    process.start()
    sender.close()  # else there would be no end of file
    life, error = Life(), ""
    try:
        while receiver.poll(LIMIT):
            kind, what = receiver.recv()
            if kind == "error":
                error = what
            elif kind == "answer":
                life.answer = what
            else:
                life.reports.append(what)
                if kill_behind is not None:
                    if len(life.reports) == kill_behind[0]:
                        time.sleep(kill_behind[1])
                        process.kill()
                elif stop_at is not None and what == stop_at[0] and life.reports.count(what) == stop_at[1]:
                    process.kill()
        error = f"no word within {LIMIT} s"
    except EOFError:
        pass
    finally:
        process.kill()
        process.join()
        receiver.close()
    if error:
        raise AssertionError(f"the training failed behind {life.reports[-1:]}:\n{error}")
    life.status = process.exitcode
    return life


def _run(argv: list[str], sender: Connection, stop_at: tuple[str, int] | None) -> None:
    """In the process: the example as it is, but for the reports."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()

    def report(what: str) -> None:
        counts.update((what, "anything"))
        sender.send(("report", what))
        if stop_at in ((what, counts[what]), ("anything", counts["anything"])):
            signal.pause()

    try:
        if stop_at is not None:
            register_optimizer_step_pre_hook(lambda *_: report("stepping"))
            register_optimizer_step_post_hook(lambda *_: report("stepped"))
            patches = [
                mock.patch.object(torch, "save", _in_pieces(torch.save, report)),
                mock.patch.object(os, "replace", _reported(os.replace, report)),
            ]
            for patch in patches:
                patch.start()
        sender.send(("answer", crash_safe.main(argv)))
    except BaseException:
        sender.send(("error", traceback.format_exc()))


def _in_pieces(save: Callable[..., None], report: Callable[[str], None]) -> Callable[..., None]:
    def in_pieces(value: Any, file: Any) -> None:
        whole = io.BytesIO()
        save(value, whole)
        content = whole.getvalue()
        size = -(-len(content) // PIECES)
        with open(file, "wb") if isinstance(file, (str, os.PathLike)) else open(os.dup(file.fileno()), "wb") as out:
            for begin in range(0, len(content), size):
                out.write(content[begin : begin + size])
                out.flush()
                report("writing")
                time.sleep(PAUSE)

    return in_pieces


def _reported(replace: Callable[..., None], report: Callable[[str], None]) -> Callable[..., None]:
    def reported(source: Any, target: Any) -> None:
        report("written")
        replace(source, target)
        report("renamed")

    return reported
