"""A hub on loopback that speaks what huggingface_hub's client speaks, and misbehaves on order."""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS = 2000  # bytes from which a file is stored as LFS, as the hub does with weights


@dataclass
class Fault:
    """What goes wrong with a file (or, under the name "", with the listing), `times` times."""

    status: int = 0  # an answer instead of the file
    cut: int = -1  # bytes after which the connection is dropped
    stall: float = 0  # seconds of silence after half of the file
    corrupt: bool = False
    times: int = 1


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> name -> content
    main: str = ""
    token: str | None = None  # who asks without it is told 401
    gated: bool = False

    def push(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(b"".join(k.encode() + v for k, v in sorted(files.items())))
        self.main = digest.hexdigest()
        self.commits[self.main] = files
        return self.main


class Hub:
    """Serve repositories under `url`; `requests` lists what was asked, with the range if any."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, Fault] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, file, range
        self.sent = 0  # bytes of files
        self.slow = 0.0  # seconds between chunks
        hub = self

        class Handler(_Handler):
            owner = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def push(self, name: str, folder: Path, commit: str | None = None) -> str:
        """Publish a folder as the repository's newest commit, or as the one named."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        repo = self.repos.setdefault(name, Repo())
        made = repo.push(files)
        if commit is not None:
            repo.commits[commit] = repo.commits.pop(made)
            repo.main = made = commit
        return made

    def fetched(self, name: str) -> list[str | None]:
        """The range of every GET of a file."""
        return [span for method, file, span in self.requests if (method, file) == ("GET", name)]


def etag(content: bytes) -> str:
    if len(content) >= LFS:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    owner: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self.listing(found[1], found[2])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(found[1], found[2], found[3])
        else:
            self.refuse(404)

    def repository(self, name: str) -> Repo | None:
        repo = self.owner.repos.get(name)
        if repo is None:
            self.refuse(401, "RepoNotFound")  # as the hub answers strangers
            return None
        if repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            self.refuse(401, "GatedRepo" if repo.gated else "RepoNotFound")
            return None
        return repo

    def listing(self, name: str, revision: str) -> None:
        self.owner.requests.append(("GET", "", None))
        if self.fails(""):
            return
        repo = self.repository(name)
        if repo is None:
            return
        commit = repo.main if revision == "main" else revision
        if commit not in repo.commits:
            self.refuse(404, "RevisionNotFound")
            return
        siblings = []
        for path, content in repo.commits[commit].items():
            row: dict = {"rfilename": path, "size": len(content), "blobId": etag(content)}
            if len(content) >= LFS:
                row["blobId"] = "0" * 40  # of the pointer file in git
                row["lfs"] = {"sha256": etag(content), "size": len(content), "pointerSize": 130}
            siblings.append(row)
        body = json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
        self.reply(200, body, {"Content-Type": "application/json"})

    def file(self, name: str, revision: str, path: str) -> None:
        span = self.headers.get("Range")
        self.owner.requests.append((self.command, path, span))
        fault = self.owner.faults.get(path) if self.command == "GET" else None
        if self.command == "GET" and self.fails(path):
            return
        repo = self.repository(name)
        if repo is None:
            return
        commit = repo.main if revision == "main" else revision
        content = repo.commits.get(commit, {}).get(path)
        if content is None:
            self.refuse(404, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(content)}"', "Accept-Ranges": "bytes"}
        if len(content) >= LFS:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{etag(content)}"'}
        first = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span else 0  # type: ignore[index]
        status = 206 if span else 200
        if span:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        body = content[first:]
        if self.command == "GET" and fault is not None and fault.times > 0 and not fault.status:
            fault.times -= 1
            self.misbehave(fault, status, body, headers)
        else:
            self.reply(status, body, headers)

    def fails(self, path: str) -> bool:
        fault = self.owner.faults.get(path)
        if fault is None or not fault.status or fault.times <= 0:
            return False
        fault.times -= 1
        self.refuse(fault.status)
        return True

    def misbehave(self, fault: Fault, status: int, body: bytes, headers: dict[str, str]) -> None:
        if fault.corrupt:
            self.reply(status, bytes([body[0] ^ 1]) + body[1:], headers)
            return
        self.begin(status, headers | {"Content-Length": str(len(body))})
        part = body[: fault.cut] if fault.cut >= 0 else body[: len(body) // 2]
        self.wfile.write(part)
        self.wfile.flush()
        self.owner.sent += len(part)
        if fault.stall:
            time.sleep(fault.stall)
        self.close_connection = True
        self.connection.close()

    def refuse(self, status: int, code: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        if status in (429, 503):
            headers["Retry-After"] = "0"
        self.reply(status, b"{}", headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.begin(status, headers | {"Content-Length": str(len(body))})
        if self.command == "GET":
            for start in range(0, len(body), 1 << 16):
                self.wfile.write(body[start : start + (1 << 16)])
                if "/resolve/" in self.path:
                    self.owner.sent += min(len(body) - start, 1 << 16)
                if self.owner.slow:
                    self.wfile.flush()
                    time.sleep(self.owner.slow)

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
