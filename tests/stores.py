"""Stores on loopback for tests: an S3 API and web servers, with faults to order."""
from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec

SLOW_DOWN = (b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>')


@contextmanager
def s3_server(fault: Callable[[dict[str, Any]], bool] = lambda request: False) -> Iterator[str]:
    """The endpoint of an S3 API without a bucket. A request (as WSGI says it) at which `fault` is true is answered 503 SlowDown."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    moto = DomainDispatcherApplication(create_backend_app)

    def app(request: dict[str, Any], start: Any) -> Any:
        if fault(request):
            request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
            start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(SLOW_DOWN)))])
            return [SLOW_DOWN]
        return moto(request, start)

    server = make_server("127.0.0.1", 0, app, True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def s3_environment(endpoint: str) -> dict[str, str]:
    """What points boto3 and s3fs, of this process and of those it starts, at an endpoint. It tries once: what is tested tries again."""
    return {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true"}


@contextmanager
def s3_bucket(name: str = "bucket", fault: Callable[[dict[str, Any]], bool] = lambda request: False) -> Iterator[str]:
    """The URL of an empty bucket of a server of its own, which this process's environment points at in the block."""
    import s3fs

    name = f"{name}-{os.urandom(4).hex()}"  # moto keeps the buckets of all its servers as long as the process lives
    with s3_server(fault) as endpoint, patch.dict(os.environ, s3_environment(endpoint)):
        s3fs.S3FileSystem.clear_instance_cache()
        fsspec.filesystem("s3").mkdir(name)
        try:
            yield f"s3://{name}"
        finally:
            s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def http_server(folder: str | Path, ranges: bool = True, sizes: bool = True, faults: Iterable[str] = (), heads: Iterable[str] = (),
                asked: list[str] | None = None) -> Iterator[str]:
    """The URL of a folder behind HTTP, with range requests or without, with or without Content-Length.

    `faults` are of its GETs and `heads` of its HEADs, in order: an HTTP status, "hang", "cut" (half of the body, then the connection
    is reset) or "" for none; then all is well. `asked` is told each GET's Range.
    """
    gets, probes, over = iter(faults), iter(heads), threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def __init__(self, *args: Any):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args: Any) -> None: ...

        def faulty(self, fault: str) -> bool:
            if fault == "hang":
                over.wait(20)
            elif fault.isdigit():
                self.send_error(int(fault))
            return fault == "hang" or fault.isdigit()

        def do_HEAD(self) -> None:
            if self.faulty(next(probes, "")):
                return
            if os.path.isdir(self.translate_path(self.path)) or sizes:
                super().do_HEAD()
            else:
                self.send_response(200)
                self.end_headers()

        def do_GET(self) -> None:
            if asked is not None:
                asked.append(self.headers.get("Range", ""))
            fault, path = next(gets, ""), self.translate_path(self.path)
            if self.faulty(fault):
                return
            if not os.path.isfile(path):
                super().do_GET()
                return
            body, wanted = Path(path).read_bytes(), self.headers.get("Range") if ranges else None
            if wanted:
                begin, end = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{min(end, len(body) - 1)}/{len(body)}")
                body = body[begin:end + 1]
            else:
                self.send_response(200)
            if sizes:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body[:len(body) // 2] if fault == "cut" else body)
            except ConnectionError:  # who asked has gone
                return
            if fault == "cut":
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no orderly end
                self.connection.shutdown(socket.SHUT_RD)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            over.set()
            server.shutdown()
