"""An OpenAI-compatible server on this machine, to be told how to answer: a real one, over a real socket."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], Any]  # status, headers, body: JSON, or bytes as they are, at once or one by one


def completion(text: str | None, top: dict[str, float] | None = None, **choice: Any) -> Reply:
    """A chat completion; ``top``: log-probabilities of its first token."""
    made: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, **choice}
    if top is not None:
        listed = [{"token": token, "logprob": value, "bytes": None} for token, value in top.items()]
        made["logprobs"] = {"content": [{"token": listed[0]["token"], "logprob": 0.0, "top_logprobs": listed}]}
    return 200, {}, {"id": "x", "object": "chat.completion", "choices": [made]}


class JudgeServer:
    """``answer``: from the request's JSON to the reply; ``asked``: every request, with its headers; ``most``: how
    many were on the way at once.
    """

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], Reply] = lambda _sent: completion("60")
        self.asked: list[tuple[dict[str, Any], dict[str, str], str]] = []
        self.now = self.most = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.asked.append((sent, dict(self.headers), self.path))
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    status, headers, body = outer.answer(sent)
                finally:
                    with outer._lock:
                        outer.now -= 1
                pieces = body if isinstance(body, Iterator) else [body]
                pieces = pieces if isinstance(body, bytes | Iterator) else [json.dumps(body).encode()]
                length = {} if isinstance(body, Iterator) else {"Content-Length": str(len(pieces[0]))}
                self.send_response(status)
                for name, value in {**length, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in pieces:
                    self.wfile.write(piece)

            def log_message(self, *_words: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_request: None  # who asks may hang up
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def questions(self) -> list[str]:
        return [sent["messages"][0]["content"] for sent, _, _ in self.asked]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
