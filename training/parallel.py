"""One run on several devices: which process this is, how the others are started, and how they agree."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pipeline.machine import usable_cores
from pipeline.schema import UserError
from pipeline.storage.files import write_atomically
from training.peers import PeerWatch, is_one_of_several

T = TypeVar("T")

BUSY_SHARE = 0.5
"""A core on which other work takes more than this share of the time counts as taken."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of the run: its ``rank`` among all ``size``.

    Rank 0 writes the files.  ``local_rank`` tells it from the ``local_size`` processes that share this machine, those
    of runs beside this one too.  ``control`` is a group of all ranks for small messages between hosts, which no device
    has to be waited for.  ``name`` is that of a run beside others, and its lines begin with it; ``idle_cores`` were
    idle before these runs began.
    """

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0
    local_size: int = 1
    control: Any = field(default=None, compare=False)
    name: str = ""
    idle_cores: int | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def alone(self) -> World:
        """Return a world of this process only, on the same device."""
        return World(0, 1, self.device)

    def own_part(self, items: Sequence[T]) -> Sequence[T]:
        """Return what this process does of what the processes of its run on this machine do together."""
        return items[self.local_rank :: self.local_size] if self.size > 1 else items

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up ``tensor`` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, item: T) -> list[T]:
        """Return the item of every rank, on every rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.control)
        return items

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self.control)


class StopSignal:
    """Hears SIGTERM and SIGINT while the context lasts, so that all ranks can save and leave at the same step.

    At each :meth:`poll` a rank says what it heard, and gets to know what all had said at the poll before, without
    waiting for them or for a device.
    """

    def __init__(self, world: World) -> None:
        self._world, self._heard = world, 0
        self._asked: tuple[Any, Tensor] | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        if self._asked is not None:
            self._asked[0].wait()  # no message may be under way when the group ends
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self._heard = number

    def poll(self) -> int:
        """Return the number of a signal that a rank had heard by the poll before (or by now, if it is alone), or 0."""
        if self._world.size == 1:
            return self._heard
        answer = 0
        if self._asked is not None:
            handle, flags = self._asked
            handle.wait()
            answer = int(flags)
        flags = torch.tensor(self._heard)
        self._asked = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._world.control, async_op=True), flags
        return answer


def choose_device(name: str, local_rank: int) -> torch.device:
    """Return this process's device for ``auto``, ``cpu`` or ``cuda``; too few GPUs are a UserError."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"--device {name}: {torch.cuda.device_count()} GPUs here, {local_rank + 1} wanted")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def choose_threads(asked: int | None, world: World, *, limit: int | None = None) -> int:
    """Return the number of threads for operations on this process's CPU.

    By default it is this process's share of the cores that it may use and on which no other work runs: a thread that
    has to wait for a core makes all others wait at the end of every operation.

    Args:
        asked: ``--threads``; None = ``OMP_NUM_THREADS`` where that is set, else decide.
        world: this process among those of the machine.
        limit: most threads from which the model gains; None = no limit.
    """
    if asked is None and os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        asked = max(1, int(os.environ["OMP_NUM_THREADS"]))
    if asked is not None:
        return asked
    if world.device.type != "cpu" and limit is None:
        limit = 4  # the host only launches
    share = max(1, usable_cores() // world.local_size)
    most = min(share, limit or share)
    if most == 1:
        return 1
    return max(1, min(most, (world.idle_cores or count_idle_cores()) // world.local_size))


def count_idle_cores() -> int:
    """Return on how many cores that this process may use no other work runs; it takes 0.4 seconds."""
    looks = [psutil.cpu_percent(interval=0.2, percpu=True) for _ in range(2)]
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(looks[0]))
    # A core that is busy once may just have ended something.
    return max(sum(core < len(use) and use[core] < 100 * BUSY_SHARE for core in cores) for use in looks)


def run(worker: Callable[[World], int], *, devices: int, device: str) -> int:
    """Call ``worker`` in one process per device and return its exit code.

    Under ``torchrun`` this process is one of them already; otherwise ``devices`` > 1 starts PyTorch's own launcher,
    which ends the others when one fails.  What the user can mend is raised here, from whichever process it comes.
    """
    if "LOCAL_RANK" in os.environ:
        return _join(worker, device)
    if devices == 1:
        return worker(World(0, 1, choose_device(device, 0)))
    config = LaunchConfig(1, 1, devices, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "user_error"
        try:
            return max(elastic_launch(config, _join)(worker, device, note).values())
        except SignalException as stopped:  # the launcher has passed it on, and the processes have ended
            return 128 + int(stopped.sigval)
        except ChildFailedError as failed:
            if note.exists():
                raise UserError(note.read_text("utf-8")) from None
            codes = [failure.exitcode for failure in failed.failures.values() if failure.exitcode > 128]
            if codes:
                return int(codes[0])
            killed = [rank for rank, failure in failed.failures.items() if failure.exitcode < 0]
            if not killed:
                raise
            raise UserError(
                f"process {killed[0]} of {devices} was killed, most likely for want of memory; the others were ended; "
                "--resume goes on from the last checkpoint; lower --batch_size or --devices if it comes again"
            ) from None


def _join(worker: Callable[[World], int], device: str, note: Path | None = None) -> int:
    """Call ``worker`` as one of several processes; a UserError is in ``note`` before the others see this one end.

    Without a ``note`` there may be other launchers, on other machines, and the processes watch one another.
    """
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    watch = PeerWatch() if note is None and is_one_of_several() else None
    chosen = choose_device(device, local_rank)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    control = dist.new_group(backend="gloo")
    try:
        code = worker(World(dist.get_rank(), dist.get_world_size(), chosen, local_rank, local_size, control))
    except (UserError, OSError) as error:
        if note is None:
            raise
        write_atomically(note, str(error).encode())
        code = 2
    except RuntimeError:  # such as that of a collective operation with a process that is lost
        if watch is not None:
            watch.await_loss()
        raise
    finally:
        dist.destroy_process_group()
    if watch is not None:
        watch.close()
    if code and note is not None:  # a value that is returned would wait for a launcher that may be ending itself
        sys.exit(code)
    return code
