"""Repositories in memory. A commit is made whole and then named by its branch: nobody sees half of one."""

import base64
import hashlib
import threading
from dataclasses import dataclass, field


class RefusedError(Exception):
    """An answer other than 2xx."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Blob:
    content: bytes
    lfs: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self):
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
        )

    @property
    def oid(self):
        """Git's, of what Git stores."""
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: "Commit | None"
    message: str
    files: dict[str, Blob]


@dataclass
class Repository:
    name: str
    private: bool
    refs: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded to the large file storage
    proposals: list[dict] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        self.put(
            "main", {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)}, "initial"
        )

    def put(self, ref, changes, message, parent=None):
        """Commit `changes` (None deletes) onto `parent`, and let `ref` name it."""
        before = parent or self.refs.get(ref)
        files = {**(before.files if before else {}), **changes}
        files = {path: blob for path, blob in files.items() if blob is not None}
        text = f"{before.oid if before else ''} {message} {sorted((p, b.oid) for p, b in files.items())}"
        made = Commit(hashlib.sha1(text.encode()).hexdigest(), before, message, files)
        self.refs[ref] = made
        return made

    def at(self, revision):
        """The commit that a branch, a pull request or an id names."""
        found = self.refs.get(revision) or next((c for c in self.history() if c.oid == revision), None)
        if found is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def history(self):
        """Every commit that any reference leads to."""
        seen = {}
        for commit in self.refs.values():
            while commit is not None and commit.oid not in seen:
                seen[commit.oid] = commit
                commit = commit.parent
        return list(seen.values())

    def upload(self, oid, content):
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusedError(400, "the content has another digest than its oid")
        self.objects[oid] = content

    def commit(self, revision, lines, create_pr):
        """Make a commit of the NDJSON lines of a request; all of them count, or none."""
        with self.lock:
            header = next(line["value"] for line in lines if line["key"] == "header")
            head = self.at(revision)
            if header.get("parentCommit") not in (None, head.oid):
                raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
            changes = dict(self._change(line["key"], line["value"], head) for line in lines if line["key"] != "header")
            ref = f"refs/pr/{len(self.proposals) + 1}" if create_pr else revision
            made = self.put(ref, changes, header["summary"], parent=head)
            if create_pr:
                self.proposals.append({"num": len(self.proposals) + 1, "title": header["summary"], "status": "open"})
            return made, ref

    def _change(self, kind, value, head):
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/"):
            raise RefusedError(400, f"bad path {path}")
        if kind == "file":
            return path, Blob(base64.b64decode(value["content"], validate=True), False)
        if kind == "lfsFile":
            content = self.objects.get(value["oid"])
            if content is None or len(content) != value["size"]:
                raise RefusedError(400, f"LFS object {value['oid']} was not uploaded")
            return path, Blob(content, True)
        if kind == "deletedFile":
            if path not in head.files:
                raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
            return path, None
        raise RefusedError(400, f"unknown operation {kind}")
