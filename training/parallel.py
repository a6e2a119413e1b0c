"""One run on several devices: who am I, start the others, add up what we have."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pipeline.schema import UserError
from pipeline.storage.files import write_atomically

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """This process among the run's.

    Attributes:
        rank: 0 … size − 1; rank 0 writes the files.
        size: processes of the run.
        device: where this one computes.
        local_rank: 0 … local_size − 1.
        local_size: processes of the run on this machine.
    """

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` added up over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, item: T) -> list[T]:
        """The item of every rank, on every rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether the flag is raised on any rank; all ranks must ask."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item()) if self.size > 1 else flag


def choose_device(name: str, local_rank: int) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` -> this process's device.

    Raises:
        UserError: CUDA is asked for and there are not enough GPUs.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"--device {name}: {torch.cuda.device_count()} GPUs here, {local_rank + 1} wanted")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def run(worker: Callable[[World], int], *, devices: int, device: str) -> int:
    """Call ``worker`` in one process per device and return its exit code.

    Under ``torchrun`` this process is one of them already; otherwise ``devices`` > 1 starts PyTorch's own launcher,
    which ends the others when one fails.  What the user can mend is raised here, from whichever process it comes.
    """
    if "LOCAL_RANK" in os.environ:
        return _join(worker, device)
    if devices == 1:
        return worker(World(0, 1, choose_device(device, 0)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "user_error"
        try:
            return max(elastic_launch(config, _join_with_note)(worker, device, note).values())
        except ChildFailedError as failed:
            if note.exists():
                raise UserError(note.read_text("utf-8")) from None
            killed = [rank for rank, failure in failed.failures.items() if failure.exitcode < 0]
            if not killed:
                raise
            raise UserError(
                f"process {killed[0]} of {devices} was killed, most likely for want of memory; the others were ended; "
                "--resume goes on from the last checkpoint; lower --batch_size or --devices if it comes again"
            ) from None


def _join_with_note(worker: Callable[[World], int], device: str, note: Path) -> int:
    """As :func:`_join`, but what the user can mend is in ``note`` before the other processes see this one end."""

    def noting(world: World) -> int:
        try:
            return worker(world)
        except (UserError, OSError) as error:
            write_atomically(note, str(error).encode())
            sys.exit(2)

    return _join(noting, device)


def _join(worker: Callable[[World], int], device: str) -> int:
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    chosen = choose_device(device, local_rank)
    if chosen.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        return worker(World(dist.get_rank(), dist.get_world_size(), chosen, local_rank, local_size))
    finally:
        dist.destroy_process_group()
