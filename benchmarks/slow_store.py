"""An object store on this machine that is as slow as one far away: a delay a request, and a limit of each stream.

The store is moto's S3, which speaks the protocol in full; a proxy before it delays.  Both run in a process of their
own, so that they share no interpreter with what is measured, but they do share its cores.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from tests.object_store import ENVIRONMENT, ObjectStore

PIECE_BYTES = 1 << 18
HOP_BY_HOP = {"connection", "transfer-encoding", "date", "server"}


@contextmanager
def serve_slowly(directory: Path, *, delay: float, bytes_per_second: float) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the URL of a copy of ``directory`` in the store, and the environment in which a process finds it.

    Args:
        delay: seconds before each answer.
        bytes_per_second: of each stream; several streams side by side have as much each.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs, directory, delay, bytes_per_second), daemon=True)
    server.start()
    try:
        url, endpoint = ours.recv()
        yield url, {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}
    finally:
        ours.close()
        server.join()


def _serve(caller: Connection, directory: Path, delay: float, bytes_per_second: float) -> None:
    store = ObjectStore()
    url = store.upload(directory, "data")
    handler = type("Handler", (_SlowHandler,), {"store": store.url, "delay": delay, "rate": bytes_per_second})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=proxy.serve_forever, daemon=True).start()
    caller.send((url, f"http://127.0.0.1:{proxy.server_port}"))
    try:
        caller.recv()
    except EOFError:
        proxy.shutdown()
        store.stop()


class _SlowHandler(BaseHTTPRequestHandler):
    """Passes requests to the store and gives its answers slowly."""

    protocol_version = "HTTP/1.1"
    store: str
    delay: float
    rate: float

    def do_GET(self) -> None:
        asked = time.monotonic()
        connection = HTTPConnection(urlsplit(self.store).netloc)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        time.sleep(max(self.delay - (time.monotonic() - asked), 0))
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.end_headers()
        began, sent = time.monotonic(), 0
        while piece := answer.read(PIECE_BYTES):
            self.wfile.write(piece)
            sent += len(piece)
            time.sleep(max(sent / self.rate - (time.monotonic() - began), 0))
        connection.close()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass
