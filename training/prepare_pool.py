"""Batches prepared in processes of their own (``--prefetch_workers``): one thread prepares some 4,000 patients/s.

The loader's thread gathers batches and hands them on; a process prepares each and sends it back as one buffer, which is
put into page-locked memory where there is a GPU.  What is prepared depends on (seed, step, patient) alone, so the
batches are the same as without processes, in the same order.
"""

from __future__ import annotations

import dataclasses
import signal
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

from model.prepared import PackedBatch
from pipeline.loading.batch import PatientBatch
from pipeline.loading.place import BatchPlace
from pipeline.machine import exit_with_parent
from training.data import BatchPreparer, ReadyBatch

KILLED = "a process that prepares batches was killed, most likely for want of memory; lower --prefetch_workers"


@dataclass(frozen=True, slots=True)
class _Given:
    """Returns what it was given: a function that can be sent."""

    value: Any

    def __call__(self) -> Any:
        return self.value


class PreparePool:
    """Prepares batches as ``preparer`` does, in ``workers`` processes, and returns futures of them, in any order.

    Processes start with the first batch; :meth:`close` ends them.
    """

    def __init__(self, preparer: BatchPreparer, workers: int) -> None:
        self._preparer, self._pin = dataclasses.replace(preparer, pin=False), preparer.pin
        self._executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start)

    def __call__(self, batch: PatientBatch, place: BatchPlace) -> Future[ReadyBatch]:
        # Where this is not the whole global batch, lengths of the others are needed, and a function cannot be sent.
        is_whole = batch.num_patients == place.counts.num_patients
        place = dataclasses.replace(place, global_batch=_Given(None if is_whole else place.global_batch()))
        ready: Future[ReadyBatch] = Future()

        def settle(sent: Future[tuple[ReadyBatch, list[PackedBatch]]]) -> None:
            try:
                unpacked, parts = sent.result()
                received = [part.receive(pin=self._pin) for part in parts]
                ready.set_result(dataclasses.replace(unpacked, parts=received))
            except BrokenExecutor:
                ready.set_exception(ChildProcessError(KILLED))
            except BaseException as error:  # it is raised where the batch is asked for
                ready.set_exception(error)

        try:
            self._executor.submit(_prepare, self._preparer, batch, place).add_done_callback(settle)
        except BrokenExecutor:
            raise ChildProcessError(KILLED) from None
        return ready

    def close(self) -> None:
        """End the processes; batches that are being prepared are dropped."""
        self._executor.shutdown(cancel_futures=True)


def _start() -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # the first process hears them, and ends this one
        signal.signal(number, signal.SIG_IGN)
    exit_with_parent()


def _prepare(preparer: BatchPreparer, batch: PatientBatch, place: BatchPlace) -> tuple[ReadyBatch, list[PackedBatch]]:
    ready = preparer(batch, place)
    return dataclasses.replace(ready, parts=[]), [PackedBatch.send(part) for part in ready.parts]
