"""The HTTP side: routes of the Hub's API onto `store`, with the log and the faults."""

import json
import re
import threading
from dataclasses import dataclass
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from loopback_hub.faults import Fault, Faults
from loopback_hub.rules import errors
from loopback_hub.store import Blob, RefusedError, Repository

TOKEN = "hf_" + "loopback" * 4
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
EPOCH = datetime(2026, 1, 1, tzinfo=timezone.utc).isoformat().replace("+00:00", "Z")


@dataclass(frozen=True)
class Entry:
    """A request in the log."""

    method: str
    path: str
    repo: str
    status: int | None
    fault: Fault | None


class Answer:
    def __init__(self, body=b"", status=200, headers=None):
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status = status
        self.headers = headers or {"Content-Type": "application/json"}


class LoopbackHub:
    """A running Hub; use it as a context manager.

    Attributes:
        repositories: by id.
        log: the requests, in the order they were answered.
        faults: drawn for each request, or None.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.log: list[Entry] = []
        self.faults: Faults | None = None
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home):
        """What makes a `huggingface_hub` in another process talk to this one; `home` is its HF_HOME."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # xet's storage is a service of its own; without it the client uses LFS
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def create(self, name, private=False, files=None):
        """A repository, with `files` (path to bytes) in a first commit."""
        made = self.repositories[name] = Repository(name, private)
        if files:
            made.put(
                "main", {path: Blob(content, path.endswith(".safetensors")) for path, content in files.items()}, "v0"
            )
        return made

    # Routes. Each takes the request and what its pattern found, and gives an Answer or raises RefusedError.

    def whoami(self, _request):
        return Answer({"type": "user", "name": "somebody", "orgs": [], "auth": {"type": "access_token"}})

    def create_repository(self, request):
        asked = request.json()
        name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        with self._lock:
            if name in self.repositories:
                raise RefusedError(409, "You already created this model repo")
            self.create(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return Answer({"url": f"{self.endpoint}/{name}", "name": name, "id": name})

    def validate(self, request):
        wrong, warned = errors(request.json()["content"])
        found = {"errors": [{"message": m} for m in wrong], "warnings": [{"message": m} for m in warned]}
        return Answer(found, 400 if wrong else 200)

    def preupload(self, request, repo, revision):
        head = self.at(repo, revision)
        return Answer(
            {
                "files": [
                    {
                        "path": asked["path"],
                        "uploadMode": "lfs" if asked["path"].endswith((".safetensors", ".bin")) else "regular",
                        "shouldIgnore": False,
                        "oid": head.files[asked["path"]].etag if asked["path"] in head.files else None,
                    }
                    for asked in request.json()["files"]
                ]
            }
        )

    def batch(self, request, repo):
        objects = []
        for asked in request.json()["objects"]:
            there = asked["oid"] in self.repository(repo).objects
            actions = {
                "upload": {"href": f"{self.endpoint}/lfs/{repo}/{asked['oid']}"},
                "verify": {"href": f"{self.endpoint}/lfs/{repo}/verify"},
            }
            objects.append(asked if there else {**asked, "actions": actions})
        return Answer({"transfer": "basic", "objects": objects})

    def upload(self, request, repo, oid):
        self.repository(repo).upload(oid, request.body)
        return Answer()

    def verify(self, request, repo):
        asked = request.json()
        content = self.repository(repo).objects.get(asked["oid"])
        if content is None or len(content) != asked["size"]:
            raise RefusedError(404, "no such object")
        return Answer({})

    def commit(self, request, repo, revision):
        found = self.repository(repo)
        if request.fault is Fault.RIVAL:
            theirs = {
                f"rival-{len(found.history())}.txt": Blob(b"mine", False),
                "adapter_model.bin": Blob(b"mine", True),
            }
            found.put(revision, theirs, "a rival's commit")
        lines = [json.loads(line) for line in request.body.splitlines()]
        create_pr = request.query.get("create_pr") == ["1"]
        made, ref = found.commit(revision, lines, create_pr)
        answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{self.endpoint}/{repo}/commit/{made.oid}"}
        if create_pr:
            answer["pullRequestUrl"] = f"{self.endpoint}/{repo}/discussions/{ref.rpartition('/')[2]}"
        return Answer(answer)

    def branch(self, request, repo, revision):
        found = self.repository(repo)
        with found.lock:
            if revision in found.refs:
                raise RefusedError(409, "Reference already exists")
            found.refs[revision] = found.at(request.json().get("startingPoint") or "main")
        return Answer({})

    def info(self, _request, repo, revision="main"):
        found, head = self.repository(repo), self.at(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(head.files)]
        return Answer({"id": repo, "modelId": repo, "sha": head.oid, "private": found.private, "siblings": siblings})

    def paths_info(self, request, repo, revision):
        """As `tree`, for the paths asked for, in JSON or as a form; a mirror asks so."""
        form = request.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")
        asked = parse_qs(request.body.decode()) if form else request.json()
        found = json.loads(self.tree(request, repo, revision).body)
        return Answer([entry for entry in found if entry["path"] in asked["paths"]])

    def tree(self, _request, repo, revision):
        return Answer(
            [
                {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
                | (
                    {"lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}}
                    if blob.lfs
                    else {}
                )
                for path, blob in sorted(self.at(repo, revision).files.items())
            ]
        )

    def references(self, _request, repo):
        refs = self.repository(repo).refs.items()
        return Answer(
            {
                "branches": [
                    {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c.oid} for n, c in refs if "/" not in n
                ],
                "pullRequests": [{"name": n, "ref": n, "targetCommit": c.oid} for n, c in refs if "/" in n],
                "tags": [],
                "converts": [],
            }
        )

    def discussions(self, _request, repo):
        about = {"author": {"name": "somebody"}, "createdAt": EPOCH, "isPullRequest": True}
        found = [{**p, **about, "repo": {"name": repo, "type": "model"}} for p in self.repository(repo).proposals]
        return Answer({"discussions": found, "count": len(found), "start": 0})

    def resolve(self, request, repo, revision, path):
        head = self.at(repo, revision)
        headers = {"X-Repo-Commit": head.oid, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        blob = head.files.get(path)
        if blob is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        headers |= {"ETag": f'"{blob.etag}"'} | ({"X-Linked-Size": str(len(blob.content))} if blob.lfs else {})
        wanted = re.match(r"bytes=(\d+)-$", request.headers.get("Range", ""))
        if wanted and (start := int(wanted[1])) < len(blob.content):
            end = len(blob.content)
            return Answer(blob.content[start:], 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{end}"})
        return Answer(blob.content, 200, headers)

    def repository(self, repo):
        if repo not in self.repositories:
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        return self.repositories[repo]

    def at(self, repo, revision):
        return self.repository(repo).at(revision)


REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    (method, re.compile(f"^{pattern}$"), route)
    for method, pattern, route in (
        ("GET", "/api/whoami-v2", LoopbackHub.whoami),
        ("POST", "/api/repos/create", LoopbackHub.create_repository),
        ("POST", "/api/validate-yaml", LoopbackHub.validate),
        ("POST", f"/api/models/{REPO}/preupload/{REVISION}", LoopbackHub.preupload),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", LoopbackHub.batch),
        ("PUT", rf"/lfs/{REPO}/(?P<oid>[0-9a-f]{{64}})", LoopbackHub.upload),
        ("POST", f"/lfs/{REPO}/verify", LoopbackHub.verify),
        ("POST", f"/api/models/{REPO}/commit/{REVISION}", LoopbackHub.commit),
        ("POST", f"/api/models/{REPO}/branch/{REVISION}", LoopbackHub.branch),
        ("GET", f"/api/models/{REPO}", LoopbackHub.info),
        ("GET", f"/api/models/{REPO}/revision/{REVISION}", LoopbackHub.info),
        ("GET", f"/api/models/{REPO}/tree/{REVISION}/?", LoopbackHub.tree),
        ("POST", f"/api/models/{REPO}/paths-info/{REVISION}", LoopbackHub.paths_info),
        ("GET", f"/api/models/{REPO}/refs", LoopbackHub.references),
        ("GET", f"/api/models/{REPO}/discussions", LoopbackHub.discussions),
        ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", LoopbackHub.resolve),
    )
]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_):
        pass

    def json(self):
        return json.loads(self.body)

    def do_GET(self):
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _handle(self):
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        method = "GET" if self.command == "HEAD" else self.command
        found, route = next(
            ((m, r) for verb, pattern, r in ROUTES if verb == method and (m := pattern.match(split.path))), (None, None)
        )
        groups = {name: unquote(value) for name, value in found.groupdict().items()} if found else {}
        self.repo = groups.get("repo", "")
        faults = self.hub.faults
        of = self.repo or self.headers.get("X-Repository", "")  # a few requests name it in their body only
        self.fault = faults.draw(of, f"{route.__name__} {groups.get('path', '')}".strip()) if faults and route else None
        if self.fault is Fault.CUT_REQUEST:
            self.rfile.read(min(int(self.headers.get("Content-Length") or 0), 64))
            self._note(None)
            return self._break()
        self.body = self._read()
        answer = self._answer(route, groups)
        self._note(answer.status)
        if self.fault is Fault.NO_ANSWER:
            return self._break()
        return self._send(answer)

    def _answer(self, route, groups):
        early = {Fault.BUSY: 429, Fault.BROKEN: 500, Fault.DOWN: 503, Fault.CONFLICT: 409}
        if self.fault in early:
            return Answer({"error": self.fault.value}, early[self.fault], {"Retry-After": "0"})
        if self.fault is Fault.EXPIRED or not self._known(route):
            text = "Invalid credentials in Authorization header"
            return Answer({"error": text}, 401, {"X-Error-Message": text})
        try:
            if route is None:
                raise RefusedError(404, f"this Hub has no {self.command} {self.path}")
            answer = route(self.hub, self, **groups)
        except RefusedError as refused:
            headers = {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
            return Answer({"error": str(refused)}, refused.status, headers)
        return Answer({"error": "500"}, 500) if self.fault is Fault.BROKEN_YET_DONE else answer

    def _known(self, route):
        """Reading a public repository needs no token, and the storage's links carry their own right."""
        if route in (LoopbackHub.upload, LoopbackHub.verify) or route is None:
            return True
        given = self.headers.get("Authorization")
        if given is not None:
            return given == f"Bearer {TOKEN}"
        public = self.repo in self.hub.repositories and not self.hub.repositories[self.repo].private
        return self.command in ("GET", "HEAD") and (public or self.repo not in self.hub.repositories)

    def _read(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, answer):
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is Fault.CUT_ANSWER:
            self.wfile.write(answer.body[: len(answer.body) // 2])
            self._break()
            return
        self.wfile.write(answer.body)

    def _break(self):
        self.close_connection = True
        self.wfile.flush()

    def _note(self, status):
        self.hub.log.append(Entry(self.command, self.path, self.repo, status, self.fault))
