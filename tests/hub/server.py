"""A Hub on loopback for the real huggingface_hub client: pushes, pulls, and failures when a test asks for them."""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socket import SHUT_RDWR, socket
from socketserver import ThreadingTCPServer
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from hub.api import ROUTES, Answer, Api, Call, as_json
from hub.repository import Blob, Commit, Repository


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the next requests for a step.

    Args:
        status: Nothing is done, and the answer is this HTTP status.
        times: For so many requests.
        retry_after: Seconds in the header `Retry-After`.
        drop: The connection is closed: `"before"` anything is done; `"after"` it is done, so that the answer is lost;
            in the `"middle"` of the answer's body.
        delay: Seconds until the server begins with a request.
        meanwhile: What happens before the server begins with a request.
    """

    status: int | None = None
    times: int = 1
    retry_after: int | None = None
    drop: Literal["before", "middle", "after"] | None = None
    delay: float = 0.0
    meanwhile: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        known = self.drop in (None, "before", "middle", "after")
        if not known or self.times < 1 or not (self.status or self.drop or self.delay or self.meanwhile):
            raise ValueError(f"Nothing would go wrong: {self}")


@dataclass
class Request:
    """A request that arrived.

    Args:
        method: HTTP method.
        path: Without the query, quoted as it was sent.
        step: What it is for: the first argument of each `@_route` in `hub/api.py`; None: unknown to this server.
        token: The user whose token came with it, None without one.
        status: HTTP status of the answer, None while there is none.
    """

    method: str
    path: str
    step: str | None
    token: str | None
    status: int | None = None


class HubServer:
    """A Hub that lives as long as the `with` block. Its content survives `stop` and `start`.

    Args:
        tokens: Users by their token. A user owns the namespace of the same name.
        chunk_bytes: Large files above this size are uploaded in parts of it; None: every file in one piece.
        read_only: Those of the tokens that may read only.
    """

    def __init__(
        self, tokens: Mapping[str, str] | None = None, chunk_bytes: int | None = None, read_only: Collection[str] = ()
    ):
        self.requests: list[Request] = []
        self._api = Api(tokens or {}, read_only, chunk_bytes)
        self._faults: dict[str, deque[Fault]] = {route.step: deque() for route in ROUTES}
        self._lock = threading.Lock()
        self._port = 0
        self._down = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Begins to listen, after `stop` on the same port."""
        self._down.clear()
        self._listener = _Listener(("127.0.0.1", self._port), self)
        self._port = self._listener.server_address[1]
        self._api.endpoint = self.endpoint
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuses connections, and closes those that there are. A second call does nothing."""
        self._down.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._listener.close_connections()
        self._thread.join()

    def environment(self, home: str | Path, token: str | None = None) -> dict[str, str]:
        """The whole environment of a client process that knows this Hub only.

        Args:
            home: The client's folder for its cache.
            token: For `HF_TOKEN`; None: the client has none.
        """
        ours = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
        kept |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        # Xet is another protocol, with servers of its own.
        return kept | {"HF_HUB_DISABLE_XET": "1"} | ({"HF_TOKEN": token} if token else {})

    def fail(self, step: str, fault: Fault) -> None:
        """Lets the next requests for a step go wrong, after the faults that it has already been given.

        Args:
            step: As in `Request.step`.
            fault: What goes wrong, and how often.
        """
        if step not in self._faults:
            raise ValueError(f"No step is called {step!r}. There are {', '.join(sorted(self._faults))}.")
        self._faults[step].extend([fault] * fault.times)

    def mend(self) -> None:
        """Takes back all faults that no request has met yet."""
        for faults in self._faults.values():
            faults.clear()

    def create(self, repo_id: str, private: bool = False) -> None:
        """Makes an empty repository, without a request."""
        self._api.repositories[repo_id] = Repository(repo_id, private)

    def add_commit(self, repo_id: str, files: Mapping[str, bytes], message: str, revision: str = "main") -> Commit:
        """Commits files as somebody else, without a request."""
        with self._lock:
            repository = self._api.repositories[repo_id]
            head = repository.at(revision)
            added = {path: Blob(body, head.is_lfs(path, len(body), body[:512])) for path, body in files.items()}
            repository.lfs |= {blob.sha256: blob.content for blob in added.values() if blob.lfs}
            return repository.commit(revision, message, "", "somebody else", {**head.tree, **added})

    def is_private(self, repo_id: str) -> bool:
        """Whether only its owner sees a repository."""
        return self._api.repositories[repo_id].private

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The history of a revision, the newest first. Like the Hub's, it begins with a commit of `.gitattributes`."""
        return list(self._api.repositories[repo_id].history(revision))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of every file, by its path."""
        tree = self._api.repositories[repo_id].at(revision).tree
        return {path: blob.content for path, blob in tree.items()}

    def respond(self, call: Call) -> tuple[Answer | None, bool]:
        """Records a request and does what it says, or what a fault says.

        Returns:
            The answer, None if the connection is to be closed instead; and whether it is to be closed half-way.
        """
        route, _ = self._api.route(call)
        request = Request(call.method, call.path, route and route.step, self._api.user(call))
        with self._lock:
            self.requests.append(request)
            faults = self._faults[route.step] if route else None
            fault = faults.popleft() if faults else None
        if self._down.wait(fault.delay if fault else 0) or (fault and fault.drop == "before"):
            return None, False
        if fault and fault.meanwhile:
            fault.meanwhile()
        if fault and fault.status:
            retry_after = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            answer = as_json({"error": "A fault that the test asked for"}, fault.status, retry_after)
        else:
            with self._lock:
                answer = self._api.answer(call)
        if fault and fault.drop == "after":
            return None, False
        request.status = answer.status
        return answer, bool(fault and fault.drop == "middle")


class _Listener(ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], hub: HubServer):
        super().__init__(address, _Handler)
        self.hub = hub
        self.connections: set[socket] = set()

    def get_request(self) -> tuple[socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self.connections):
            try:
                connection.shutdown(SHUT_RDWR)
            except OSError:
                # The client was faster.
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients give up, and stop() closes connections in the middle of an answer.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    protocol_version = "HTTP/1.1"
    # One packet an answer: the second of two waits for the client's acknowledgement of the first.
    wbufsize = -1

    def _respond(self) -> None:
        address = urlsplit(self.path)
        call = Call(self.command, address.path, address.query, self.headers, self._body())
        answer, cut = self.server.hub.respond(call)
        self.close_connection = answer is None or cut
        if answer is None:
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if cut else answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _respond

    def _body(self) -> bytes:
        # Whole, whatever comes of it: closing a connection that still has something to read resets it, and the client
        # then reports another error.
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *args: Any) -> None:
        pass
