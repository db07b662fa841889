"""A small Hub on loopback: what `huggingface_hub` calls to make a repository, push to it and download from it."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from ruamel.yaml import YAML

TOKEN = "hf_of_the_loopback_tester"
OWNER = "tester"
LARGE = (".safetensors", ".png", "tokenizer.json")  # sent by Git LFS, as the Hub's own .gitattributes has it
HUB_LICENCES = ("apache-2.0", "mit", "other", "unknown")


class HubServer:
    """Repositories in memory, kept over a `stop` and a `start`.

    Attributes:
        repos: "owner/name" -> {"private": bool, "branches": {branch: {path: bytes}}, "commits": [summary]}.
        blobs: large files by their SHA-256.
        requests: (method, path) of every request, in order.
        bodies: what was sent with them.
        refuse: word of a path; such requests are answered with 403.
        stop_after: end of a path; the server goes down once it has answered such a request.
        busy: word of a path, and how many such requests are still answered with 503.
        lost: how many commits are still made without telling so: their answer is 504.
    """

    def __init__(self):
        self.repos, self.blobs, self.requests, self.bodies, self.unknown = {}, {}, [], [], []
        self.refuse = self.stop_after = None
        self.busy, self.lost = ("", 0), 0
        self.lock = threading.Lock()

    def start(self) -> "HubServer":
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def environment(self, home, **extra) -> dict[str, str]:
        """Return what a child process needs to talk to this server with a cache of its own in `home`."""
        # Offering Xet would take a server of chunks; without it the client sends large files by Git LFS.
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        return {**own, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", **extra}

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo_id]["branches"][branch]

    def count(self, method: str, word: str) -> int:
        return sum(verb == method and word in path for verb, path in self.requests)


class HubHandler(BaseHTTPRequestHandler):
    """One request; HTTP/1.0, so that no connection outlives a server that has gone down."""

    hub: HubServer

    def do_GET(self):
        self.serve("GET")

    def do_HEAD(self):
        self.serve("HEAD")

    def do_POST(self):
        self.serve("POST")

    def do_PUT(self):
        self.serve("PUT")

    def log_message(self, *args):
        """Say nothing."""

    def serve(self, method: str) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with hub.lock:
            hub.requests.append((method, path))
            hub.bodies.append(body)
            if hub.refuse and hub.refuse in path:
                self.fail(403, message="You have no right to do this")
            elif hub.busy[1] and hub.busy[0] in path:
                hub.busy = (hub.busy[0], hub.busy[1] - 1)
                self.fail(503, message="Come back later")
            else:
                self.route(method, path.strip("/").split("/"), body)
        if hub.stop_after and path.endswith(hub.stop_after):
            hub.stop()

    def route(self, method: str, parts: list[str], body: bytes) -> None:
        match (method, *parts):
            case ("POST", "api", "repos", "create"):
                self.create(json.loads(body))
            case ("POST", "api", "validate-yaml"):
                self.validate(json.loads(body)["content"])
            case ("PUT", "lfs", oid):
                self.hub.blobs[oid] = body
                self.reply({})
            case (_, "api", "models" | "datasets", owner, name, *rest):
                if self.may_see(f"{owner}/{name}"):
                    self.of_repository(method, f"{owner}/{name}", rest, body)
            case ("POST", owner, name, "info", "lfs", "objects", "batch") if name.endswith(".git"):
                if self.may_write():
                    self.batch(json.loads(body)["objects"])
            case ("GET" | "HEAD", owner, name, "resolve", branch, *path):
                if self.may_see(f"{owner}/{name}"):
                    self.resolve(f"{owner}/{name}", branch, "/".join(path))
            case _:
                self.hub.unknown.append((method, *parts))
                self.fail(404, message="the loopback Hub does not know this address")

    def of_repository(self, method: str, repo_id: str, rest: list[str], body: bytes) -> None:
        branches = self.hub.repos[repo_id]["branches"]
        match (method, *rest):
            case ("GET",) | ("GET", "revision", _):
                self.info(repo_id, rest[-1] if rest else "main")
            case ("GET", "auth-check", "write") if self.may_write():
                self.reply({})
            case ("POST", "branch", branch) if self.may_write():
                self.reply({}, 409 if branch in branches else 200)
                branches.setdefault(branch, dict(branches["main"]))
            case ("POST", "preupload", branch) if self.may_write():
                self.preupload(branches[branch], json.loads(body)["files"])
            case ("POST", "commit", branch) if self.may_write():
                self.commit(repo_id, branch, [json.loads(line) for line in body.splitlines()])
            case ("GET", "tree", branch, *folder):
                self.tree(self.find(repo_id, branch), "/".join(folder))
            case _:
                self.hub.unknown.append((method, repo_id, *rest))

    # Who may do what

    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def may_write(self) -> bool:
        if not self.known():
            self.fail(401, message="Invalid credentials in Authorization header")
        return self.known()

    def may_see(self, repo_id: str) -> bool:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo["private"] and not self.known()):
            self.fail(404 if self.known() else 401, code="RepoNotFound", message="Repository not found")
            return False
        return True

    # Making and filling a repository

    def create(self, wish: dict) -> None:
        if not self.may_write():
            return
        repo_id = f"{wish['organization'] or OWNER}/{wish['name']}"
        exists = repo_id in self.hub.repos
        if not exists:
            private = wish.get("visibility") == "private"
            self.hub.repos[repo_id] = {"private": private, "branches": {"main": {}}, "commits": []}
        self.reply({"url": f"{self.hub.url}/{repo_id}", "name": repo_id}, 409 if exists else 200)

    def validate(self, content: str) -> None:
        """Check a card's head by the Hub's rules for what this project writes into it."""
        data, errors = YAML(typ="safe").load(content.split("---\n")[1]), []
        if data.get("license") not in HUB_LICENCES:
            errors.append({"message": f'"license" must be one of {HUB_LICENCES}'})
        if "base_model" in data and data["base_model"].count("/") != 1:
            errors.append({"message": '"base_model" is not valid. Use a model id from https://hf.co/models.'})
        self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, files: dict[str, bytes], asked: list[dict]) -> None:
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": object_id(file["path"], files[file["path"]]) if file["path"] in files else None,
            }
            for file in asked
        ]
        self.reply({"files": answers})

    def batch(self, objects: list[dict]) -> None:
        """Say where large files go; nowhere, when they are here already."""
        answers = [
            wanted
            if wanted["oid"] in self.hub.blobs
            else {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
            for wanted in objects
        ]
        self.reply({"transfer": "basic", "objects": answers})

    def commit(self, repo_id: str, branch: str, lines: list[dict]) -> None:
        repo = self.hub.repos[repo_id]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo["commits"].append(value["summary"])
            elif line["key"] == "file":
                repo["branches"][branch][value["path"]] = base64.b64decode(value["content"])
            else:
                repo["branches"][branch][value["path"]] = self.hub.blobs[value["oid"]]
        if self.hub.lost:
            self.hub.lost -= 1
            self.fail(504, message="No answer in time")
            return
        sha = commit_id(repo["branches"][branch])
        self.reply({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    # Reading it

    def find(self, repo_id: str, revision: str) -> dict[str, bytes]:
        """Return the files of a branch, or of a branch's newest commit."""
        branches = self.hub.repos[repo_id]["branches"]
        by_commit = {commit_id(files): files for files in branches.values()}
        return {**by_commit, **branches}[revision]

    def info(self, repo_id: str, revision: str) -> None:
        repo, files = self.hub.repos[repo_id], self.find(repo_id, revision)
        names = [{"rfilename": name} for name in files]
        self.reply({"id": repo_id, "private": repo["private"], "sha": commit_id(files), "siblings": names})

    def tree(self, files: dict[str, bytes], folder: str) -> None:
        inside = {name: content for name, content in files.items() if name.startswith(folder)}
        rows = [
            {"type": "file", "path": name, "size": len(content), "oid": object_id(name, content)}
            for name, content in inside.items()
        ]
        self.reply(rows) if rows else self.fail(404, code="EntryNotFound", message="no such folder")

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        files = self.find(repo_id, revision)
        head = {"X-Repo-Commit": commit_id(files)}
        if path not in files:
            self.fail(404, code="EntryNotFound", message="no such file", **head)
            return
        self.reply(files[path], ETag=f'"{object_id(path, files[path])}"', **head)

    def reply(self, content, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, *, message: str, code: str | None = None, **headers: str) -> None:
        error_headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.reply({"error": message}, status, **headers, **error_headers)


def object_id(path: str, content: bytes) -> str:
    """Return the SHA-256 of a large file, and Git's own id of a small one."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_id(files: dict[str, bytes]) -> str:
    listing = "".join(f"{name} {object_id(name, content)}\n" for name, content in sorted(files.items()))
    return hashlib.sha1(listing.encode()).hexdigest()
