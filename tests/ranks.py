"""Processes that form a gloo process group and live for a test session: they run functions for tests.

`import torch` takes seconds, so a test must not start its own.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT = 300  # seconds: what a test does takes a few, on a busy machine a minute; then a rank waits for another


class Ranks:
    def __init__(self, size: int) -> None:
        self.size = size
        self._directory = tempfile.TemporaryDirectory()
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit locks of threads that it does not
        store = str(Path(self._directory.name) / "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_work, args=(rank, size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call it on every rank at once; return what each returned, or raise what one raised."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        while len(results) < self.size:
            ready = wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in results], TIMEOUT)
            for pipe in ready:
                rank = self._pipes.index(pipe)
                failed, results[rank] = pipe.recv()
                if failed:
                    # The others may wait for it for ever.
                    self.close()
                    raise AssertionError(f"rank {rank} of {self.size}:\n{results[rank]}")
            if not ready:
                self.close()
                raise AssertionError(f"only ranks {sorted(results)} of {self.size} answered within {TIMEOUT} s")
        return [results[rank] for rank in range(self.size)]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._directory.cleanup()


def _work(rank: int, size: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, store=dist.FileStore(store, size))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = (False, function(*args))
        except BaseException:
            answer = (True, traceback.format_exc())
        pipe.send(answer)
