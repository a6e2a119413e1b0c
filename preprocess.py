"""Prepare event tables for training, once: ``python preprocess.py INPUT --output DATA``."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

from rich.console import Console

from pipeline.prepare.build import build
from pipeline.prepare.command import parse_command, resolve_options
from pipeline.prepare.console import print_summary, stage_bars
from pipeline.reports.data_report import write_data_report
from pipeline.schema import PRIVATE_UMASK, REPORT_FILE, UserError
from pipeline.storage.files import remove_leftovers

DISK_FULL: Final = "{}: no space left on the disk; free some, and the same command goes on from here"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 = done, 2 = something the user can mend.  Only the owner can read the files it makes."""
    os.umask(os.umask(PRIVATE_UMASK) | PRIVATE_UMASK)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    output = None
    try:
        options, explicit = parse_command(arguments)
        output = options.command.output
        source, build_options = resolve_options(options, explicit)
        console = Console(stderr=True, highlight=False)
        console.print(f"{options.command.input}: read as {source.name}")
        with stage_bars(console) as update_bars:
            shown: dict[str, Any] = {"progress": update_bars, "log": partial(_log, console, output)}
            overwrite = options.command.overwrite
            summary = build(source, output, build_options, execution=options.execution, overwrite=overwrite, **shown)
        if not (output / REPORT_FILE).exists():
            remove_leftovers(output, REPORT_FILE)
            write_data_report(output)
    except (UserError, OSError) as error:
        is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        print(f"preprocess.py: {DISK_FULL.format(output) if is_full else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("preprocess.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    print_summary(summary, verbose=options.command.verbose)
    print(f"{output}: ready; {output / REPORT_FILE} shows it")
    return 0


def _log(console: Console, output: Path, line: str) -> None:
    console.print(f"{output}: {line}", soft_wrap=True)


def _interrupt(number: int, _: object) -> NoReturn:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(main())
