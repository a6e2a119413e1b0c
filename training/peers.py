"""The other processes of a run on several machines: one that is lost ends all, with one line on each machine.

A collective operation waits half an hour for a machine that has gone silent, and tells nobody which it was.  So each
process says once a second, in the store of PyTorch's launcher, that it is there, and listens to the next one; the last
listens to the first.  Who misses its neighbour, or leaves with an error, writes the reason into the store, where all
others read it.  The store is on the machine of rank 0: if it does not answer, that one is lost.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from pipeline.schema import UserError

PERIOD = 1.0
"""Seconds between two signs of life."""

MAX_SILENCE = 24
"""Periods without a sign of life, in which this process itself ran, after which another is lost.  A call that holds the
interpreter's lock keeps a healthy process silent for seconds; all must have ended 30 seconds after the loss."""

SUSPECT_SILENCE = 5
"""Periods that suffice where a collective operation has failed: some process is lost, and the silent one is it."""

ADVICE = "--resume goes on from the last checkpoint, also on fewer machines"
REASON, SUSPICION, LEFT = "reason", "suspicion", "left"
_opened: list[Store] = []
_ENDING = threading.Lock()  # of two threads that end the process only one is to speak, and to finish its sentence


def end_with_line(line: str) -> None:
    """Print why this process ends, and tell the others of its run, which end with the same line.

    Of the processes of one machine the first prints it.
    """
    if not is_one_of_several():
        print(line, file=sys.stderr)
        return
    with _ENDING:
        is_first = True
        with suppress(RuntimeError):  # without a store each speaks for itself
            store = open_store(timedelta(seconds=10))
            store.compare_set(REASON, "", line)
            is_first = claim_speech(store)
        if is_first:
            print(line, file=sys.stderr, flush=True)
        time.sleep(2 * PERIOD)  # meanwhile the others read it; the store may be in this process


def is_one_of_several() -> bool:
    """Return whether ``torchrun``, or whatever sets its variables, started this process beside others."""
    return "LOCAL_RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def open_store(timeout: timedelta) -> Store:
    """Return this process's connection to the store of the run; RuntimeError if there is none after ``timeout``."""
    if not _opened:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        _opened.append(PrefixStore("peers", store))
    return _opened[0]


def claim_speech(store: Store) -> bool:
    """Return whether this is the first process of its machine to ask."""
    return store.add(f"said/{os.environ.get('GROUP_RANK', '0')}", 1) == 1


def check_restarts() -> None:
    """Raise UserError where ranks that ``torchrun`` restarts would find in its store what those before had written."""
    restarts, is_shared = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("MAX_RESTARTS", "USE_AGENT_STORE"))
    if restarts not in (None, "0") and is_shared == "True":
        advice = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, with --rdzv-backend c10d, or leave it out"
        raise UserError(f"--max-restarts {restarts}: new ranks would find the addresses of the old ones; {advice}")


class PeerWatch:
    """Says that this process is there, and ends it, with exit code 2, where another is lost or left with an error."""

    def __init__(self) -> None:
        check_restarts()
        self._rank, self._size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._store = open_store(timedelta(minutes=30))
        self._unanswered, self._closed = 0, threading.Event()
        for watch in (self._watch_neighbour, self._watch_store):
            threading.Thread(target=watch, daemon=True).start()

    def close(self) -> None:
        """Leave in peace: nobody misses this process, and it misses nobody."""
        self._closed.set()
        with suppress(RuntimeError):
            self._store.set(f"beat/{self._rank}", LEFT)
            self._store.set(f"left/{self._rank}", "")
            if self._rank == 0:  # the store may be in this process
                self._store.wait([f"left/{rank}" for rank in range(self._size)], timedelta(seconds=10))

    def await_loss(self) -> None:
        """Return if no process is found lost within some seconds: an error of this one had another reason."""
        with suppress(RuntimeError):
            self._store.set(SUSPICION, "")  # for all: the neighbour that misses it may not have seen an error
        self._closed.wait(2 * SUSPECT_SILENCE * PERIOD)

    def _watch_neighbour(self) -> None:
        """Beat, read the reason for which all are to end, and listen to the neighbour's beats."""
        neighbour, number, silence, heard = (self._rank + 1) % self._size, 0, 0, ""
        try:
            while not self._closed.wait(PERIOD):
                number += 1
                self._store.set(f"beat/{self._rank}", f"{number} {socket.gethostname()}")
                if self._store.check([REASON]):
                    self._end(self._store.get(REASON).decode())
                beat = heard
                if self._store.check([f"beat/{neighbour}"]):  # it may not have begun
                    beat = self._store.get(f"beat/{neighbour}").decode()
                    if beat == LEFT:  # who leaves has no message left for others
                        self._closed.set()
                self._unanswered = 0
                silence, heard = (silence + 1 if heard and beat == heard else 0), beat
                if silence > (SUSPECT_SILENCE if self._store.check([SUSPICION]) else MAX_SILENCE):
                    host = heard.partition(" ")[2]
                    reason = self._store.compare_set(REASON, "", self._describe_loss(neighbour, host))
                    self._end(reason.decode())
        except RuntimeError:
            if not self._closed.wait(PERIOD):  # the launcher's store may go as this process does
                self._end_without_store()

    def _watch_store(self) -> None:
        """End the process where the store is silent: a call to a machine that has lost its network does not return."""
        while not self._closed.wait(PERIOD):
            self._unanswered += 1
            if self._unanswered > MAX_SILENCE or self._is_orphan:
                self._end_without_store()

    def _end_without_store(self) -> NoReturn:
        if self._is_orphan:
            lost = f"torchrun was killed on {socket.gethostname()}, so its ranks stop"
            self._end(f"train.py: {lost}; {ADVICE}", has_store=False)
        self._end(self._describe_loss(0, os.environ["MASTER_ADDR"]), has_store=False)

    def _describe_loss(self, rank: int, host: str) -> str:
        return f"train.py: lost rank {rank} of {self._size}, on {host}, so all stop; {ADVICE}"

    @property
    def _is_orphan(self) -> bool:
        return self._launcher not in (None, os.getppid())

    def _end(self, line: str, *, has_store: bool = True) -> NoReturn:
        """End this process from any thread: its others may wait in calls that nothing interrupts."""
        with _ENDING:
            is_first = claim_speech(self._store) if has_store else os.environ["LOCAL_RANK"] == "0"
            if is_first:
                print(line, file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)
