"""A Hub of our own: a server in this process that speaks the part of the Hugging Face Hub's HTTP interface that its client uses."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from typing import ClassVar
from urllib.parse import unquote, urlparse

import pytest

TOKEN = "hf_a_token_that_nobody_may_see"
STORED = (".safetensors",)  # what the Hub keeps apart from git, by its sha256


def commit_of(files):
    """The name of a commit: 40 hexadecimal digits."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def etag(name, content):
    if name.endswith(STORED):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """What the Hub has.

    Attributes:
      models: {NAME/MODEL: [files of each commit, {path: content}]}.
      private, gated, closed: models that only a login sees, that it asks for, and that no login may write.
      cut: {path: how often only half of it is sent, though all is promised}.
      stored: {sha256: content} of what was sent apart from git.
      requests: (method, path) of all that was asked.
    """

    def __init__(self):
        self.models, self.stored, self.requests = {}, {}, []
        self.private, self.gated, self.closed, self.cut = set(), set(), set(), {}

    def put(self, name, files):
        """A commit that somebody made; its name."""
        self.models.setdefault(name, []).append(dict(files))
        return commit_of(files)

    def asked(self, path):
        """How often the content of this file was sent."""
        return sum(method == "GET" and each.endswith(f"/{path}") for method, each in self.requests)


class Refused(Exception):
    def __init__(self, status, code="", message=""):
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        return None

    def _answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.path = unquote(urlparse(self.path).path)
        self.hub.requests.append((self.command, self.path))
        self.login = self.headers.get("Authorization")
        try:
            if self.login not in (None, f"Bearer {TOKEN}"):
                raise Refused(401, message="Invalid credentials in Authorization header")
            for pattern, answer in self.ROUTES.items():
                method, _, path = pattern.partition(" ")
                if method == self.command and (found := re.fullmatch(path, self.path)):
                    return answer(self, **found.groupdict())
            raise Refused(404)
        except Refused as refused:
            self._send(b"{}", refused.headers, refused.status)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _send(self, content, headers=(), status=200, sent=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if sent is None else sent)
        if sent is not None:
            self.close_connection = True

    def _json(self, value):
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    # --- what is asked ---

    def _model(self, name, write=False):
        if name not in self.hub.models or (name in self.hub.private and not self.login):
            raise Refused(404 if self.login else 401, "RepoNotFound", "Repository not found")
        if name in self.hub.gated:
            raise Refused(403, "GatedRepo", "Access to this model is restricted")
        if write and (not self.login or name in self.hub.closed):
            raise Refused(403, message="You don't have the rights to write here")
        return self.hub.models[name]

    def _commit(self, name, revision):
        commits = {commit_of(files): files for files in self._model(name)}
        if revision == "main":
            return [*commits.items()][-1]
        if revision not in commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return revision, commits[revision]

    def whoami(self):
        if not self.login:
            raise Refused(401)
        self._json({"type": "user", "name": "owner", "orgs": []})

    def create(self):
        told = json.loads(self.body)
        name = f"{told['organization']}/{told['name']}"
        if not self.login or told["organization"] != "owner":
            raise Refused(403, message="You don't have the rights to create a model under this namespace")
        if name in self.hub.models:
            self._send(json.dumps({"url": f"/{name}", "error": "You already created this model"}).encode(), status=409)
            return
        self.hub.models[name] = [{}]
        if told.get("visibility") == "private" or told.get("private"):
            self.hub.private.add(name)
        self._json({"url": f"{self.server.address}/{name}", "name": name})

    def info(self, name):
        commit, _ = self._commit(name, "main")
        self._json({"id": name, "sha": commit, "private": name in self.hub.private})

    def tree(self, name, revision):
        _, files = self._commit(name, revision)
        self._json([{"type": "file", "path": p, "size": len(c), "oid": etag("", c)} for p, c in files.items()])

    def resolve(self, name, revision, path):
        commit, files = self._commit(name, revision)
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        content = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(path, content)}"'}
        short = self.command == "GET" and self.hub.cut.get(path, 0) > 0
        if short:
            self.hub.cut[path] -= 1
        self._send(content, headers, sent=content[: len(content) // 2] if short else None)

    def validate(self):
        self._json({"errors": [], "warnings": []})

    def preupload(self, name):
        self._model(name, write=True)
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(STORED) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for each in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def batch(self, name):
        self._model(name, write=True)

        def told(each):
            action = {"href": f"{self.server.address}/stored/{each['oid']}"}
            return {"oid": each["oid"], "size": each["size"], "actions": {"upload": action}}

        self._json({"transfer": "basic", "objects": [told(each) for each in json.loads(self.body)["objects"]]})

    def store(self, digest):
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise Refused(400)
        self.hub.stored[digest] = self.body
        self._send(b"")

    def commit(self, name):
        files = dict(self._model(name, write=True)[-1])
        for line in self.body.splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif told["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        commit = self.hub.put(name, files)
        address = f"{self.server.address}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": address})

    NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
    ROUTES: ClassVar = {
        "GET /api/whoami-v2": whoami,
        "POST /api/repos/create": create,
        "POST /api/validate-yaml": validate,
        f"GET /api/models/{NAME}": info,
        f"GET /api/models/{NAME}/tree/(?P<revision>.+)": tree,
        f"POST /api/models/{NAME}/preupload/main": preupload,
        f"POST /api/models/{NAME}/commit/main": commit,
        f"POST /{NAME}.git/info/lfs/objects/batch": batch,
        "PUT /stored/(?P<digest>[0-9a-f]{64})": store,
        f"GET /{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": resolve,
        f"HEAD /{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": resolve,
    }


@contextlib.contextmanager
def running():
    """(Hub, its address) while a server answers for it."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub, server.address
    finally:
        server.shutdown()
        server.server_close()


def environment(address, folder):
    """What a process's environment says of this Hub: its address, a cache of its own, and no login."""
    return {
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The Hub that this process's client talks to; nobody is logged in."""
    from huggingface_hub import constants

    from flowlm.system import hub as ours

    with running() as (hub, address):
        monkeypatch.setattr(
            constants, "ENDPOINT", address
        )  # the client reads its environment once, when it is imported
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        ours.fetch.cache_clear()
        yield hub
        ours.fetch.cache_clear()
