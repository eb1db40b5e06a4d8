"""A Hub in this process: the few answers of its API that uploads and downloads of models need, over HTTP.

Repositories are commits of whole trees. Large files go through git-lfs, as on the Hub; a commit names them by hash.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


TOKEN = "hf_of_the_owner"


@dataclass
class Repository:
    private: bool
    branches: dict = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict = field(default_factory=lambda: {"0" * 40: {}})

    def commit_of(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubStandIn:
    """`with HubStandIn() as hub:` serves at `hub.url`. From a PUT to /cut/yes on, uploads of large files break off."""

    def __init__(self):
        self.repositories, self.large_files, self.cut_uploads, self.requests = {}, {}, False, []

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id, revision="main"):
        repository = self.repositories[repo_id]
        return repository.commits[repository.commit_of(revision)]


class _Refused(Exception):
    def __init__(self, status, code):
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def log_message(self, *args):
        pass

    def answer(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": len(body), **{name.replace("_", "-"): value for name, value in headers.items()}}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        self.hub.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        try:
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return action(self, *match.groups())
            raise _Refused(404, "NotServedHere")
        except _Refused as refused:
            self.answer(status=refused.status, X_Error_Code=refused.code)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def body(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    def is_owner(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, repo_id, writes=False):
        body = self.body() if writes else b""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self.is_owner()):
            raise _Refused(404 if self.is_owner() else 401, "RepoNotFound")
        if writes and not self.is_owner():
            raise _Refused(403, "Forbidden")
        return repository, body

    def commit(self, repo_id, revision):
        repository, _ = self.repository(repo_id)
        sha = repository.commit_of(revision)
        if sha is None:
            raise _Refused(404, "RevisionNotFound")
        return sha, repository.commits[sha]

    def create(self):
        asked = json.loads(self.body())
        if not self.is_owner():
            raise _Refused(401, "Unauthorized")
        repo_id = f"{asked['organization']}/{asked['name']}"
        status = 409 if repo_id in self.hub.repositories else 200
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories.setdefault(repo_id, Repository(bool(private)))
        self.answer({"url": f"{self.hub.url}/{repo_id}"}, status)

    def accept_card(self):
        self.body()
        self.answer({"errors": [], "warnings": []})

    def create_branch(self, repo_id, branch):
        repository, _ = self.repository(repo_id, writes=True)
        status = 409 if branch in repository.branches else 200
        repository.branches.setdefault(branch, repository.branches["main"])
        self.answer({}, status)

    def choose_mode(self, repo_id, revision):
        _, body = self.repository(repo_id, writes=True)
        modes = {True: "lfs", False: "regular"}
        self.answer(
            {
                "files": [
                    {"path": name, "uploadMode": modes[name.endswith(".safetensors")], "shouldIgnore": False}
                    for name in (file["path"] for file in json.loads(body)["files"])
                ]
            }
        )

    def choose_places(self, repo_id):
        _, body = self.repository(repo_id, writes=True)
        places = [
            {**asked, "actions": {"upload": {"href": f"{self.hub.url}/large/{asked['oid']}"}}}
            for asked in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": places})

    def cut(self, whether):
        self.body()
        self.hub.cut_uploads = whether == "yes"
        self.answer()

    def take_large_file(self, oid):
        if self.hub.cut_uploads:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            return self.connection.close()
        body = self.body()
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large_files[oid] = body
        return self.answer()

    def take_commit(self, repo_id, revision):
        repository, body = self.repository(repo_id, writes=True)
        files = dict(repository.commits[repository.branches[revision]])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.hub.large_files[line["value"]["oid"]]
        sha = hashlib.sha1(body).hexdigest()
        repository.commits[sha], repository.branches[revision] = files, sha
        self.answer({"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def describe(self, repo_id, revision="main"):
        sha, files = self.commit(repo_id, revision)
        self.answer({"id": repo_id, "sha": sha, "siblings": [{"rfilename": name} for name in files]})

    def list_tree(self, repo_id, revision):
        _, files = self.commit(repo_id, revision)
        self.answer(
            [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
        )

    def send_file(self, repo_id, revision, name):
        sha, files = self.commit(repo_id, revision)
        if name not in files:
            raise _Refused(404, "EntryNotFound")
        self.answer(files[name], ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"', X_Repo_Commit=sha)


REPO = r"([\w-]+/[\w-]+)"
ROUTES = (
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.accept_card),
    ("POST", f"/api/models/{REPO}/branch/(.+)", _Handler.create_branch),
    ("POST", f"/api/models/{REPO}/preupload/(.+)", _Handler.choose_mode),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.choose_places),
    ("PUT", "/large/(.+)", _Handler.take_large_file),
    ("PUT", "/cut/(yes|no)", _Handler.cut),
    ("POST", f"/api/models/{REPO}/commit/(.+)", _Handler.take_commit),
    ("GET", f"/api/models/{REPO}", _Handler.describe),
    ("GET", f"/api/models/{REPO}/revision/(.+)", _Handler.describe),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)", _Handler.list_tree),
    ("GET HEAD", f"/{REPO}/resolve/([^/]+)/(.+)", _Handler.send_file),
)
