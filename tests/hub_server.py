"""A stand-in for the hub's API on localhost: repositories in memory, as much of it as a model's push and load use."""

import base64
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """
    Serves on a free port of localhost.

    Attributes:
        files (`dict[str, bytes]`): what was pushed, by "user/name/path".
        requests (`list[str]`): methods and paths of all requests.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        """Its address, for `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        path, body = self._path(), self._body()
        if path == "/api/repos/create":
            request = json.loads(body)
            name = "/".join(filter(None, (request.get("organization") or "user", request["name"].split("/")[-1])))
            self._answer({"url": f"{self.server.url}/{name}", "id": name})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            wanted = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in wanted]
            self._answer({"files": modes, "commitOid": COMMIT})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    name = f"{match[1]}/{entry['value']['path']}"
                    self.server.files[name] = base64.b64decode(entry["value"]["content"])
            self._answer({"commitUrl": f"{self.server.url}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._answer({}, status=404)

    def do_GET(self):
        path = self._path()
        match = re.fullmatch(r"/(.+?/.+?)/resolve/[^/]+/(.+)", path)
        if match is None:
            repository = re.match(r"/api/models/([^/]+/[^/]+)", path)
            names = [name for name in self.server.files if repository and name.startswith(f"{repository[1]}/")]
            if "/tree/" in path:
                sizes = {name.split("/", 2)[2]: len(self.server.files[name]) for name in names}
                self._answer([{"type": "file", "path": name, "size": size, "oid": ""} for name, size in sizes.items()])
                return
            siblings = [{"rfilename": name.removeprefix(f"{repository[1]}/")} for name in names]
            answer = {"id": repository[1], "sha": COMMIT, "siblings": siblings} if names else {}
            self._answer(answer, status=200 if names else 404)
            return
        content = self.server.files.get(f"{match[1]}/{match[2]}")
        headers = {"X-Repo-Commit": COMMIT}
        if content is None:
            self._send(b"", 404, {**headers, "X-Error-Code": "EntryNotFound"})
        else:
            self._send(content, 200, {**headers, "ETag": f'"{hash(content):x}"'})

    do_HEAD = do_GET

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, content: dict | list, status: int = 200):
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def _send(self, content: bytes, status: int, headers: dict[str, str]):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass
