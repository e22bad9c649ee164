"""A small Hugging Face hub on this machine: the protocol that `huggingface_hub` speaks, and ways for it to break.

Repositories are dicts of revision to files. Weights answer as LFS files do: `resolve` redirects to a storage address,
which serves ranges. Every request is noted. Plain files are served beside them, as a bucket does, under /files/.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator


@dataclasses.dataclass
class Hub:
    """What is served and what was asked.

    `cuts` are consumed one a storage request: the connection ends after so many bytes, with a reset instead of an
    orderly close if `resets`. With a `stall` it first stays open without a byte more until that event. Of the plain
    `files` only those of a megabyte or more are cut; `claimed` are sizes that a HEAD gives for them and a GET does not.
    """

    repos: dict[str, dict[str, dict[str, bytes]]] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    claimed: dict[str, int] = dataclasses.field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = dataclasses.field(default_factory=list)
    cuts: list[int] = dataclasses.field(default_factory=list)
    stall: threading.Event | None = None
    resets: bool = False
    refuses: bool = False
    ignores_ranges: bool = False
    authorizations: set[str] = dataclasses.field(default_factory=set)
    endpoint: str = ""

    def storage_requests(self) -> list[str | None]:
        """The Range headers of the requests for weights, in order."""
        return [range_ for method, path, range_ in self.requests if path.startswith("/storage/")]

    def downloads(self) -> list[tuple[str, str | None]]:
        """The plain files that were sent, with the Range headers that asked for them."""
        return [
            (path.removeprefix("/files/"), range_)
            for method, path, range_ in self.requests
            if method == "GET" and path.startswith("/files/")
        ]

    def resolved(self) -> list[str]:
        """The "revision/file" of every file asked for."""
        found = (re.match(r"/[^/]+/[^/]+/resolve/(.*)", path) for _, path, _ in self.requests)
        return [match[1] for match in found if match]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the requests are in `Hub.requests`."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        refuses = (
            self.hub.refuses
        )  # before the request is noted, so that a test can let one pass and refuse the next
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        self.hub.authorizations.add(self.headers.get("Authorization") or "")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif refuses and path.startswith(("/storage/", "/files/")):
            self._answer(503)
        elif match := re.fullmatch(r"/storage/([0-9a-f]{64})", path):
            self._storage(match[1])
        elif (name := path.removeprefix("/files/")) in self.hub.files:
            data = self.hub.files[name]
            self._ranged(data, breakable=len(data) >= 1_000_000, claimed=self.hub.claimed.get(name))
        else:
            self._answer(404)

    def _info(self, repo: str, revision: str) -> None:
        if repo not in self.hub.repos:
            return self._answer(401, {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.branches.get(revision, revision)
        files = self.hub.repos[repo].get(commit)
        if files is None:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        body = {"id": repo, "sha": commit, "siblings": siblings}
        return self._answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        commit = self.hub.branches.get(revision, revision)
        data = self.hub.repos.get(repo, {}).get(commit, {}).get(name)
        if data is None:
            return self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit}
        if not name.endswith((".safetensors", ".bin")):
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            return self._answer(200, {**headers, "ETag": f'"{blob}"'}, data)
        digest = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{digest}"'}
        elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")  # as a CDN is another host
        location = f"{elsewhere}/storage/{digest}"
        return self._answer(302, {**headers, **linked, "Location": location})

    def _storage(self, digest: str) -> None:
        data = next(
            data
            for revisions in self.hub.repos.values()
            for files in revisions.values()
            for data in files.values()
            if hashlib.sha256(data).hexdigest() == digest
        )
        self._ranged(data, breakable=True)

    def _ranged(self, data: bytes, *, breakable: bool, claimed: int | None = None) -> None:
        if claimed is not None and self.command == "HEAD":
            return self._answer(200, {"Content-Length": str(claimed)})
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and self.hub.ignores_ranges:
            asked = None
        if asked:
            start = int(asked[1])
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if asked else {}
        return self._answer(206 if asked else 200, headers, data[start:], breakable=breakable)

    def _answer(
        self,
        status: int,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        *,
        breakable: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cuts.pop(0) if breakable and self.hub.cuts else None
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[:cut])
            self.wfile.flush()
        if cut is not None:
            if self.hub.stall is not None:
                self.hub.stall.wait(60)
            if self.hub.resets:
                time.sleep(0.3)  # a reset discards what the client has not read yet
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.connection.close()
            self.close_connection = True


def wait_for(happened: Callable[[], object], timeout_s: float = 30) -> None:
    """Returns when `happened` is true, which must be soon."""
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serves `hub` on a free port of this machine, whose address is then `hub.endpoint`."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            if hub.stall is not None:
                hub.stall.set()
            server.shutdown()
            thread.join()
