"""An S3-compatible server (moto) as a process, and a proxy in front of it that counts and breaks requests."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from api.up import die_with_parent, free_port

KEY, SECRET = "AKIAWHENCETEST", "not-a-secret-but-do-not-print-it"
PAGE = 50  # entries of a listing that come at once
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def environment(endpoint: str) -> dict[str, str]:
    """All that a client of the server needs, and nothing of the machine's own."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "NO_PROXY": "127.0.0.1",
    }


class Moto:
    """The server; ``boto`` makes clients that do not pass through our code."""

    def __init__(self, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
                env={**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"moto did not start: {log.read_text()[-2000:]}")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    @cache  # noqa: B019  (lives as long as the tests)
    def boto(self, service: str = "s3") -> Any:
        import boto3

        return boto3.client(
            service,
            endpoint_url=self.url,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )

    def forget_everything(self) -> None:
        self._post("reset", b"")

    def check_credentials(self, after: int) -> None:
        """From the ``after``-th request on, only known keys with fitting policies are let in."""
        self._post("reset-auth", str(after).encode())

    def _post(self, what: str, data: bytes) -> None:
        url, plain = f"{self.url}/moto-api/{what}", {"Content-Type": "text/plain"}
        with _direct.open(urllib.request.Request(url, data, plain), timeout=10) as answer:  # noqa: S310
            answer.read()


@dataclass
class Proxy:
    """``url`` stands for the server behind; what is put into the queues happens to the next requests."""

    behind: int
    requests: list[tuple[str, str]] = field(default_factory=list)
    failures: deque[int] = field(default_factory=deque)  # statuses to answer with instead
    cuts: deque[int] = field(default_factory=deque)  # bytes of the next GETs' bodies, then the line drops
    refused: int = 0
    port: int = 0
    _server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self, method: str) -> int:
        return sum(each == method for each, _ in self.requests)

    def up(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Nobody listens any more, and open lines drop at their next request."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.socket.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_arguments: object) -> None: ...

            def handle_expect_100(self) -> bool:
                return proxy._server is None or super().handle_expect_100()

            def answer(self) -> None:
                self.close_connection = True
                if proxy._server is None:
                    proxy.refused += 1
                    return
                proxy.requests.append((self.command, self.path))
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if proxy.failures:
                    data = b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"
                    self.send_response(proxy.failures.popleft())
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data if self.command != "HEAD" else b"")
                    return
                line = http.client.HTTPConnection("127.0.0.1", proxy.behind, timeout=60)
                line.request(self.command, self.path, body, dict(self.headers.items()))
                response = line.getresponse()
                data = response.read()
                self.send_response_only(response.status)
                for name, value in response.getheaders():
                    if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                        self.send_header(name, value)
                length = response.getheader("Content-Length") if self.command == "HEAD" else len(data)
                self.send_header("Content-Length", str(length or 0))
                self.end_headers()
                if self.command == "GET" and response.status == http.HTTPStatus.OK and proxy.cuts:
                    self.wfile.write(data[: proxy.cuts.popleft()])
                    return
                self.wfile.write(data)
                self.close_connection = False
                line.close()

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

        return Handler
