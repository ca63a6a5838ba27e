"""A local stand-in for the Hub: the endpoints that the real client calls, repositories in memory.

Repositories are ``{name: {revision: {file: bytes}}}``; a commit's name is a digest of its files.
Every request is recorded as ``"METHOD path"``.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

Files = dict[str, bytes]


def commit_of(files: Files) -> str:
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()


class Hub:
    """State of the stand-in."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Files]] = {}
        self.requests: list[str] = []
        self.url = ""

    def add(self, repo: str, files: Files, revision: str = "main") -> str:
        self.repos.setdefault(repo, {})[revision] = files
        return commit_of(files)

    def find(self, repo: str, revision: str) -> Files | None:
        """Files of a branch, or of a commit by its name."""
        branches = self.repos[repo]
        if revision in branches:
            return branches[revision]
        return next((f for f in branches.values() if commit_of(f) == revision), None)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, code: str, status: int = 404) -> None:
        self.reply(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def parts(self) -> list[str]:
        self.hub.requests.append(f"{self.command} {unquote(urlparse(self.path).path)}")
        return [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        match self.parts():
            case ["api", "models", user, repo, *rest] if f"{user}/{repo}" in self.hub.repos:
                revision = rest[1] if rest[:1] == ["revision"] else "main"
                files = self.hub.find(f"{user}/{repo}", revision)
                if files is None:
                    return self.fail("RevisionNotFound")
                siblings = [{"rfilename": name} for name in files]
                info = {"id": f"{user}/{repo}", "sha": commit_of(files), "siblings": siblings}
                return self.reply(200, {**info, "private": False, "tags": []})
            case [user, repo, "resolve", revision, *path]:
                return self.resolve(f"{user}/{repo}", revision, "/".join(path))
            case _:
                return self.fail("RepoNotFound")

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if repo not in self.hub.repos:
            return self.fail("RepoNotFound", 401)  # as the Hub does, not to tell private names
        files = self.hub.find(repo, revision)
        if files is None:
            return self.fail("RevisionNotFound")
        if path not in files:
            return self.reply(
                404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit_of(files)
            )
        etag = hashlib.sha1(files[path]).hexdigest()
        return self.reply(200, files[path], ETag=f'"{etag}"', X_Repo_Commit=commit_of(files))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.parts()
        if self.headers.get("Authorization") != "Bearer hf_writer" and parts[1] != "validate-yaml":
            return self.fail("Unauthorized", 401)
        match parts:
            case ["api", "repos", "create"]:
                spec = json.loads(body)
                repo = "/".join(filter(None, (spec.get("organization") or "user", spec["name"])))
                if repo in self.hub.repos:
                    return self.reply(409, {"error": "exists", "url": f"{self.hub.url}/{repo}"})
                self.hub.add(repo, {})
                return self.reply(200, {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})
            case ["api", "validate-yaml"]:
                return self.reply(200, {"errors": [], "warnings": []})
            case ["api", "models", user, repo, "branch", branch]:
                branches = self.hub.repos[f"{user}/{repo}"]
                if branch in branches:
                    return self.reply(409, {"error": "exists"})
                branches[branch] = dict(branches["main"])
                return self.reply(200, {})
            case ["api", "models", _, _, "preupload", _]:
                plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                wanted = [{"path": f["path"], **plain} for f in json.loads(body)["files"]]
                return self.reply(200, {"files": wanted})
            case ["api", "models", user, repo, "commit", revision]:
                files = dict(self.hub.repos[f"{user}/{repo}"][revision])
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                oid = self.hub.add(f"{user}/{repo}", files, revision)
                url = f"{self.hub.url}/{user}/{repo}/commit/{oid}"
                return self.reply(200, {"success": True, "commitOid": oid, "commitUrl": url,
                                        "hookOutput": "", "pullRequestUrl": None})  # fmt: skip
            case _:
                return self.fail("UnknownEndpoint")


@contextmanager
def serve() -> Iterator[Hub]:
    """A stand-in on a free local port, for as long as the context lasts."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
