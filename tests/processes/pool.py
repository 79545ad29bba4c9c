"""Processes on this machine that run checks together: started once, from a server that has imported what they need."""

import datetime
import multiprocessing
import os
import sys
import tempfile
import traceback

import torch
from torch import distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CHECKS = [f"tests.processes.test_{name}" for name in ("operators", "disagreement", "linearize")]
CONTEXT.set_forkserver_preload(["torch.distributed.fsdp", "linop_hess", *CHECKS])

# Of a check, after which its processes are ended and the test fails; of the groups, which no check may reach but those about it.
CHECK_SECONDS, GROUP_SECONDS, IMPATIENT_SECONDS = 40, 30, 1.5

GROUPS = {}
"""Within a process: groups of its pool by name."""


class Failed(Exception):
    """A check ended in an exception in some process, or in none in time."""


class Last:
    """The answer of a process that ends with it."""

    def __init__(self, answer):
        self.answer = answer


class Pool:
    """`size` processes with a gloo group, on the loopback address."""

    def __init__(self, size):
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        self.start()

    def start(self):
        store = tempfile.mktemp(dir=self.folder.name)
        pipes = [CONTEXT.Pipe() for _ in range(self.size)]
        self.pipes = [ours for ours, _ in pipes]
        self.workers = [
            CONTEXT.Process(target=work, args=(rank, self.size, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for worker in self.workers:
            worker.start()
        for _, theirs in pipes:
            theirs.close()

    def run(self, check, *args, size=None, seconds=CHECK_SECONDS):
        """Results of ``check(rank, group, *args)`` in each of the first `size` processes; exceptions as they are."""
        size = size or self.size
        for pipe in self.pipes[:size]:
            pipe.send((check, size, args))
        found = []
        for pipe in self.pipes[:size]:
            try:
                found.append(pipe.recv() if pipe.poll(seconds) else Failed(f"no answer in {seconds} s"))
            except EOFError:
                found.append(Failed("ended"))
        if any(isinstance(one, Failed) for one in found):
            self.stop()
            self.start()
        return found

    def results(self, check, *args, **options):
        """The same, where no process may fail."""
        found = self.run(check, *args, **options)
        for one in found:
            if isinstance(one, BaseException):
                raise Failed(getattr(one, "where", "")) from one
        return found

    def stop(self):
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.join()


def work(rank, size, store, pipe):
    """Run what comes through a pipe, until it is closed."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    long, short = (datetime.timedelta(seconds=seconds) for seconds in (GROUP_SECONDS, IMPATIENT_SECONDS))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=long)
    GROUPS[size] = dist.group.WORLD
    if size > 2:
        GROUPS[2] = dist.new_group([0, 1], timeout=long)
    GROUPS["impatient"] = dist.new_group([0, 1], timeout=short)
    while True:
        try:
            check, count, args = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            answer = check(rank, GROUPS[count], *args)
        except Exception as error:
            answer = error
            answer.where = traceback.format_exc()
        try:
            pipe.send(answer.answer if isinstance(answer, Last) else answer)
            if isinstance(answer, Last):
                os._exit(0)
        except Exception as error:  # what does not pickle
            pipe.send(RuntimeError(f"{type(answer).__name__}: {answer} ({error})"))
