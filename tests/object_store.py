"""An object store on 127.0.0.1: moto's S3, behind a door that can be told to misbehave."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

BUCKET = "shards"
Fault = Literal["ok", "busy", "broken", "denied", "cut", "wrong", "reset", "silent"]
STATUS = {"busy": "503 Slow Down", "broken": "500 Internal Server Error", "denied": "403 Forbidden"}
ENVIRONMENT = {  # no other store, and no credentials but these, can be found
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


class ObjectStore:
    """A running S3 server with one empty bucket.

    Attributes:
        url: where it answers.
        requests: (method, key) of all objects asked for.
        faults: what it does, one after the other, with requests for objects: ``ok`` is to answer, ``busy`` status 503,
            ``broken`` 500, ``denied`` 403; ``cut`` sends half of the content and closes; ``wrong`` changes a byte of
            it; ``reset`` resets the connection; ``silent`` says nothing until ``release`` is set.
        choose: gives the fault of a request by its method and key, once ``faults`` is empty.
    """

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.requests: list[tuple[str, str]] = []
        self.faults: deque[Fault] = deque()
        self.choose: Callable[[str, str], Fault] = lambda method, key: "ok"
        self.release = threading.Event()
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.client = boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
        )
        self.client.create_bucket(Bucket=BUCKET)

    def reset(self) -> None:
        """Behave again, and forget requests."""
        self.release.set()
        self.faults.clear()
        self.choose = lambda method, key: "ok"
        self.requests.clear()
        self.release = threading.Event()

    def stop(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.client.close()

    def wait_for(self, num_requests: int) -> None:
        """Return when there have been so many."""
        while len(self.requests) < num_requests:
            time.sleep(0.01)

    def upload(self, directory: Path, prefix: str) -> str:
        """Copy a folder there; its URL."""
        for path in directory.rglob("*"):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(directory)}"
                self.client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        _, bucket, *key = path.split("/")
        if method in ("GET", "HEAD") and bucket == BUCKET and any(key):
            self.requests.append((method, "/".join(key)))
            fault = self.faults.popleft() if self.faults else self.choose(method, "/".join(key))
            if fault in STATUS:
                start_response(STATUS[fault], [("Content-Length", "0")])
                return [b""]
            if fault == "silent":
                self.release.wait(timeout=60)
            if fault == "reset":
                connection = environ["werkzeug.socket"]
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
                raise ConnectionResetError
            if fault in ("cut", "wrong"):
                content = b"".join(self._app(environ, start_response))
                middle = len(content) // 2
                changed = bytes(255 - byte for byte in content[middle : middle + 1])
                return [content[:middle] if fault == "cut" else content[:middle] + changed + content[middle + 1 :]]
        return self._app(environ, start_response)


class _Quiet(MotoRequestHandler):
    def log_request(self, *_: Any) -> None:
        pass

    def log(self, *_: Any) -> None:
        pass
