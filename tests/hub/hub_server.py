"""A small Hugging Face Hub on the loopback interface, kept in memory, for end-to-end tests.

It speaks the routes that `huggingface_hub` uses to create, fill, list and download a repository without Xet; run the
client with `HF_ENDPOINT` set to `HubServer.url` and `HF_HUB_DISABLE_XET=1` (both are read when huggingface_hub is
imported, hence in a process of its own). Faults are injected with `HubServer.fail`. By hand:
`python tests/hub/hub_server.py`.

Interruptions are `HubServer.interrupt`: from some request on, nobody answers.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER = "me"
TOKEN = "hf_" + "loopbackHubTokenNobodyMayEverSee01"

# Like the Hub's default .gitattributes: these are stored by their sha256, all else in the commit itself.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".onnx", ".parquet", ".png", ".jpg")

REPO = r"(?P<kind>models|datasets|spaces|kernels)/(?P<repo>[\w.\-]+(?:/[\w.\-]+)?)"


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool = False
    gated: bool | str = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("0" * 40, "initial", {})]})

    def commit(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        every = (commit for branch in self.branches.values() for commit in branch)
        return next((commit for commit in every if commit.oid == revision), None)


@dataclass
class Fault:
    method: str
    path: str
    status: int
    times: int
    body: bytes
    headers: dict[str, str]
    drop: bool


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub:` serves on `hub.url` from a thread until the block ends.

    Attributes:
        repos: (kind, id) -> Repo, e.g. `hub.repos["models", "me/x"].commit("main").files["config.json"]`.
        requests: (method, path) of everything asked, in order.
        authorised: those of them that carried a token.
        sent: file -> bytes of its content that were sent.
        tokens: who may write; a request with another token gets 401, one without may only read what is public.
    """

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.tokens = {TOKEN}
        self.requests: list[tuple[str, str]] = []
        self.authorised: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.requests_left: int | None = None
        self.answer_is_lost = False
        self.on_interruption = lambda: None
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def fail(
        self,
        method: str,
        path: str,
        status: int = 503,
        *,
        times: int = 1_000_000,
        body: str = "",
        headers: dict[str, str] | None = None,
        drop: bool = False,
    ) -> None:
        """Answer the next `times` requests whose method and path match these regular expressions with `status`,
        or, with `drop`, close the connection without a word."""
        self.faults.append(Fault(method, path, status, times, body.encode(), headers or {}, drop))

    def interrupt(self, at: int, *, answered: bool = True) -> None:
        """After `at` more requests the line is dead: every later one is cut off unread. Without `answered`, the last
        one before is carried out, but its answer is lost too. `on_interruption` is called once, with the first cut."""
        self.requests_left, self.answer_is_lost = at, not answered

    def restore(self) -> None:
        self.requests_left = None

    def files(self, repo: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        return self.repos[kind, repo].commit(revision).files

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class Answer(Exception):
    """Ends the handling of a request with a status other than 200."""

    def __init__(self, status: int, message: str = "", code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two small writes, and the client would wait 40 ms between them
    server: HubServer

    def log_message(self, format: str, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        self.body = self._read_body()
        with self.server.lock:
            self.server.requests.append((method, path))
            if "Authorization" in self.headers:
                self.server.authorised.append((method, path))
            if self._cut():
                return
            fault = self._fault(method, path)
            if fault is not None:
                if fault.drop:
                    self.close_connection = True
                    self.connection.close()
                    return
                return self._send(fault.status, fault.body, fault.headers)
            try:
                for methods, pattern, action in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and method in methods.split():
                        return action(self, **match.groupdict())
                raise Answer(404, f"no route {method} {path}")
            except Answer as answer:
                headers = {"X-Error-Message": answer.message}
                if answer.code:
                    headers["X-Error-Code"] = answer.code
                self._json({"error": answer.message}, answer.status, headers)

    def _cut(self) -> bool:
        """Whether the line is dead for this request; with a lost answer, after it was carried out."""
        server, self.mute = self.server, False
        if server.requests_left is None:
            return False
        server.requests_left -= 1
        if server.requests_left == 0 and server.answer_is_lost:
            self.mute = True
            return False
        if server.requests_left >= 0:
            return False
        self._hang_up()
        return True

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()
        interrupted, self.server.on_interruption = self.server.on_interruption, lambda: None
        interrupted()

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _fault(self, method: str, path: str) -> Fault | None:
        for fault in self.server.faults:
            if fault.times > 0 and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.mute:
            return self._hang_up()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    # Who may do what ---------------------------------------------------------------------------------------------

    def _user(self) -> str | None:
        given = self.headers.get("Authorization", "")
        if not given:
            return None
        if given.removeprefix("Bearer ") not in self.server.tokens:
            raise Answer(401, "Invalid credentials in Authorization header")
        return USER

    def _writer(self, repo: str | None = None) -> None:
        if self._user() is None:
            raise Answer(401, "Authentication required")
        if repo is not None and repo.split("/")[0] != USER:
            raise Answer(403, f"You do not have the right to write to {repo}")

    def _repo(self, kind: str, repo: str) -> Repo:
        found = self.server.repos.get((kind, repo))
        if found is None or (found.private and self._user() is None):
            raise Answer(404, "Repository not found", "RepoNotFound")
        return found

    def _commit(self, kind: str, repo: str, rev: str) -> Commit:
        commit = self._repo(kind, repo).commit(rev)
        if commit is None:
            raise Answer(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return commit

    # Routes ------------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        self._writer()
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        wish = json.loads(self.body)
        repo = f"{wish.get('organization') or USER}/{wish['name']}"
        kind = f"{wish.get('type') or 'model'}s"
        self._writer(repo)
        prefix = "" if kind == "models" else f"{kind}/"
        answer = {"url": f"{self.server.url}/{prefix}{repo}", "name": repo}
        if (kind, repo) in self.server.repos:
            return self._json({**answer, "error": "You already created this repo"}, 409)
        private = wish.get("visibility") == "private" or bool(wish.get("private"))
        self.server.repos[kind, repo] = Repo(private=private)
        self._json(answer)

    def settings(self, kind: str, repo: str) -> None:
        self._writer(repo)
        found, wish = self._repo(kind, repo), json.loads(self.body)
        if "gated" in wish:
            found.gated = wish["gated"]
        if "visibility" in wish or "private" in wish:
            found.private = wish.get("visibility") == "private" or bool(wish.get("private"))
        self._json({})

    def discussions(self, kind: str, repo: str) -> None:
        branches = self._repo(kind, repo).branches
        found = [
            {
                "num": int(name.rpartition("/")[2]),
                "title": commits[-1].message,
                "author": {"name": USER},
                "createdAt": "2024-01-01T00:00:00.000Z",
                "status": "open",
                "repo": {"name": repo, "type": kind.removesuffix("s")},
                "isPullRequest": True,
            }
            for name, commits in branches.items()
            if name.startswith("refs/pr/")
        ]
        self._json({"discussions": found, "count": len(found), "start": 0})

    def delete(self) -> None:
        wish = json.loads(self.body)
        repo, kind = f"{wish.get('organization') or USER}/{wish['name']}", f"{wish.get('type') or 'model'}s"
        self._writer(repo)
        self._repo(kind, repo)
        del self.server.repos[kind, repo]
        self._json({})

    def validate_yaml(self) -> None:
        wish = json.loads(self.body)
        block = re.match(r"---\n(.*?)\n---\n", wish["content"], re.DOTALL)
        errors, warnings = [], []
        if block is None:
            warnings.append({"message": "empty or missing yaml metadata in repo card"})
        else:
            try:
                data = yaml.safe_load(block[1])
                if not isinstance(data.get("license", ""), str):
                    errors.append({"message": '"license" must be a string'})
            except yaml.YAMLError as error:
                errors.append({"message": f"invalid YAML: {error}"})
        self._json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def info(self, kind: str, repo: str, rev: str = "main") -> None:
        found, commit = self._repo(kind, repo), self._commit(kind, repo, rev)
        self._json(
            {
                "_id": "0",
                "id": repo,
                "modelId": repo,
                "sha": commit.oid,
                "private": found.private,
                "gated": found.gated,
                "tags": [],
                "siblings": [{"rfilename": name} for name in sorted(commit.files)],
            }
        )

    def refs(self, kind: str, repo: str) -> None:
        branches = self._repo(kind, repo).branches
        named = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": c[-1].oid} for b, c in branches.items()]
        self._json({"branches": named, "converts": [], "tags": []})

    def branch(self, kind: str, repo: str, rev: str) -> None:
        self._writer(repo)
        branches = self._repo(kind, repo).branches
        if rev in branches:
            raise Answer(409, "Reference already exists")
        branches[rev] = list(branches["main"])
        self._json({})

    def commits(self, kind: str, repo: str, rev: str) -> None:
        self._commit(kind, repo, rev)
        branch = self._repo(kind, repo).branches.get(rev, [])
        date = "2024-01-01T00:00:00.000Z"
        self._json(
            [{"id": c.oid, "title": c.message, "message": "", "date": date, "authors": []} for c in branch[::-1]]
        )

    def tree(self, kind: str, repo: str, rev: str, folder: str | None = None) -> None:
        files = self._commit(kind, repo, rev).files
        prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        entries, folders = [], set()
        for name in sorted(files):
            if not name.startswith(prefix):
                continue
            rest = name[len(prefix) :]
            if "/" in rest and self.query.get("recursive", ["false"])[0].lower() != "true":
                folders.add(prefix + rest.split("/")[0])
            else:
                entries.append(describe(name, files[name]))
        self._json(entries + [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders])

    def paths_info(self, kind: str, repo: str, rev: str) -> None:
        files = self._commit(kind, repo, rev).files
        form = parse_qs(self.body.decode())
        wanted = form["paths"] if form.get("paths") else json.loads(self.body)["paths"]
        self._json([describe(name, files[name]) for name in wanted if name in files])

    def _may_commit(self, repo: str) -> None:
        """Everybody may propose a change."""
        self._writer(None if self.query.get("create_pr") == ["1"] else repo)

    def preupload(self, kind: str, repo: str, rev: str) -> None:
        self._may_commit(repo)
        files = self._commit(kind, repo, rev).files
        answers = []
        for wish in json.loads(self.body)["files"]:
            mode = "lfs" if wish["path"].endswith(LFS_SUFFIXES) else "regular"
            known = describe(wish["path"], files[wish["path"]]) if wish["path"] in files else {}
            oid = known.get("lfs", known).get("oid")
            answers.append({"path": wish["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers, "commitOid": self._commit(kind, repo, rev).oid})

    def commit(self, kind: str, repo: str, rev: str) -> None:
        self._may_commit(repo)
        files = dict(self._commit(kind, repo, rev).files)
        summary = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                summary = value["summary"]
                parent = value.get("parentCommit")
                if parent and parent != self._commit(kind, repo, rev).oid:
                    raise Answer(412, "A commit has happened since")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise Answer(400, f"the LFS object of {value['path']} was never uploaded")
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                files = {name: data for name, data in files.items() if not name.startswith(value["path"])}
        branches = self._repo(kind, repo).branches
        oid = hashlib.sha1(f"{repo}{rev}{len(branches[rev])}{summary}".encode() + self.body).hexdigest()
        request = None
        if self.query.get("create_pr") == ["1"]:
            number = 1 + sum(name.startswith("refs/pr/") for name in branches)
            branches[f"refs/pr/{number}"] = [*branches[rev], Commit(oid, summary, files)]
            request = f"{self.server.url}/{repo}/discussions/{number}"
        else:
            branches[rev].append(Commit(oid, summary, files))
        url = f"{self.server.url}/{repo}/commit/{oid}"
        self._json({"commitUrl": url, "commitOid": oid, "pullRequestUrl": request, "success": True})

    def lfs_batch(self, repo: str, kind: str = "models") -> None:
        self._writer()  # anybody, as the file may be for a pull request
        self._repo(kind, repo)
        answers = []
        for wish in json.loads(self.body)["objects"]:
            answer = {"oid": wish["oid"], "size": wish["size"], "authenticated": True}
            if wish["oid"] not in self.server.blobs:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wish['oid']}", "header": {}}}
            answers.append(answer)
        self._json({"transfer": "basic", "objects": answers})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Answer(400, "the content does not have the announced hash")
        self.server.blobs[oid] = self.body
        self._json({})

    def resolve(self, repo: str, rev: str, file: str, kind: str = "models") -> None:
        commit = self._commit(kind, repo, rev)
        if self._repo(kind, repo).gated and self._user() is None:
            raise Answer(401, f"Access to {kind} {repo} is restricted", "GatedRepo")
        if file not in commit.files:
            raise Answer(404, "Entry not found", "EntryNotFound")
        data = commit.files[file]
        known = describe(file, data)
        etag = f'"{known.get("lfs", known)["oid"]}"'
        headers = {"X-Repo-Commit": commit.oid, "ETag": etag, "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(len(data))} if "lfs" in known else {}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status = 200
        if wanted is not None:
            start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            status, data = 206, data[start : end + 1]
        if self.command == "GET":
            self.server.sent[file] += len(data)
        self._send(status, data, headers)


def describe(name: str, data: bytes) -> dict:
    """A file as the tree route tells of it."""
    entry = {"type": "file", "path": name, "size": len(data)}
    entry["oid"] = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    if name.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


REV = r"(?P<rev>refs/pr/\d+|refs/convert/\w+|[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("DELETE", r"/api/repos/delete", Handler.delete),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("PUT", rf"/api/{REPO}/settings", Handler.settings),
    ("GET", rf"/api/{REPO}/discussions", Handler.discussions),
    ("GET HEAD", rf"/api/{REPO}/refs", Handler.refs),
    ("POST", rf"/api/{REPO}/branch/(?P<rev>.+)", Handler.branch),
    ("GET", rf"/api/{REPO}/commits/{REV}", Handler.commits),
    ("GET", rf"/api/{REPO}/tree/{REV}(?P<folder>/.*)?", Handler.tree),
    ("POST", rf"/api/{REPO}/paths-info/{REV}", Handler.paths_info),
    ("POST", rf"/api/{REPO}/preupload/{REV}", Handler.preupload),
    ("POST", rf"/api/{REPO}/commit/{REV}", Handler.commit),
    ("GET HEAD", rf"/api/{REPO}/revision/{REV}", Handler.info),
    ("GET HEAD", rf"/api/{REPO}", Handler.info),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("POST", r"/(?P<kind>datasets|spaces|kernels)/(?P<repo>.+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", r"/(?P<repo>.+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("GET HEAD", rf"/(?P<kind>datasets|spaces|kernels)/(?P<repo>.+?)/resolve/{REV}/(?P<file>.+)", Handler.resolve),
    ("GET HEAD", rf"/(?P<repo>.+?)/resolve/{REV}/(?P<file>.+)", Handler.resolve),
]


if __name__ == "__main__":
    with HubServer(port=8411) as hub:
        print(f"HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1 HF_TOKEN={TOKEN}", flush=True)
        threading.Event().wait()
