"""Models of cross-fitting that are trained at the same time, each by a process of its own.

They have nothing to say to one another, so that this gains more than sharing the steps of each among the processes.
"""

from __future__ import annotations

import dataclasses
import signal
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TypeAlias

import torch

from pipeline.dataset.manifest import Manifest
from pipeline.machine import exit_with_parent
from training.folds import Member
from training.options import TrainOptions
from training.parallel import StopSignal, World, choose_device, count_idle_cores

Train: TypeAlias = Callable[[TrainOptions, Manifest, World, Member], int]

PERIOD = 0.2
"""Seconds between looks for a signal."""

KILLED = (
    "was killed, most likely for want of memory; the other models were stopped; --resume goes on from their "
    "checkpoints; lower --parallel_models if it comes again"
)


def train_side_by_side(
    train: Train, manifest: Manifest, runs: Mapping[Member, TrainOptions], *, processes: int, device: str
) -> int:
    """Call ``train`` for each of ``runs`` in so many ``processes``; return 0, or the exit code of one that stopped.

    Process n computes on GPU n; where there are fewer GPUs they are shared.  A signal to this process, or a run that
    stops, fails or is killed, stops all; those that are in an epoch save their state first.

    Raises:
        ChildProcessError: a process was killed.
        Exception: whatever ``train`` raises, from the first run that does.
    """
    alone = World(0, 1, torch.device("cpu"), local_size=processes, idle_cores=count_idle_cores())
    workers, busy = dict[Connection, SpawnProcess](), dict[Connection, Member]()
    left = list(runs.items())[::-1]
    with StopSignal(alone) as stop:
        try:
            for place in range(processes):
                connection, process = _start(train, manifest, dataclasses.replace(alone, local_rank=place), device)
                workers[connection] = process
            while left or busy:
                # One that is busy is given nothing else: what is stopped must find nothing to begin.
                for connection in [each for each in workers if each not in busy][: len(left)]:
                    task = left.pop()
                    busy[connection] = task[0]
                    with suppress(BrokenPipeError):  # it is found killed below
                        connection.send(task)
                ready = set(wait(list(busy), PERIOD))
                for connection in [each for each in busy if each in ready]:
                    if code := _receive(connection, busy.pop(connection)):
                        return code
                if number := stop.poll():
                    return 128 + number
        finally:
            for connection, process in workers.items():
                if busy:
                    process.terminate()
                with suppress(BrokenPipeError):
                    connection.send(None)
            for process in workers.values():
                process.join()
    return 0


def _receive(connection: Connection, member: Member) -> int:
    """Return the exit code of a run that has ended, or raise what it raised."""
    try:
        answer = connection.recv()
    except (EOFError, ConnectionResetError):  # the second where it had not read what it is to train
        raise ChildProcessError(f"{member.name} {KILLED}") from None
    if isinstance(answer, Exception):
        raise answer
    return int(answer)


def _start(train: Train, manifest: Manifest, world: World, device: str) -> tuple[Connection, SpawnProcess]:
    """Start one of the processes; return the connection to it too, over which it is sent runs, and None at the end."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, train, manifest, world, device))
    process.start()
    theirs.close()  # so that ours ends where the process does
    return ours, process


def _work(connection: Connection, train: Train, manifest: Manifest, world: World, device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it, and stops this one
    exit_with_parent()
    chosen = choose_device(device, world.local_rank % max(torch.cuda.device_count(), 1))
    while (task := connection.recv()) is not None:
        member, options = task
        own = dataclasses.replace(world, device=chosen, name=f"{member.name}: ")
        try:
            answer: int | Exception = train(options, manifest, own, member)
        except Exception as error:  # the first process raises it
            error.add_note(traceback.format_exc())
            answer = error
        connection.send(answer)
