"""Uploads to a made-up Hub: a local server that answers what `huggingface_hub` asks."""

import base64
import http.server
import json
import re
import threading

import pytest
from huggingface_hub import constants

from ntkrl.evaluation import commands, push
from ntkrl.main import main

NAME = "team/model"


class Hub(http.server.ThreadingHTTPServer):
    """A Hub with repositories, in memory.

    Records (method, path) of requests. `status` is the answer to a request to create a repository.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.requests, self.repositories, self.files, self.status = [], {}, {}, 200
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        """Stay silent."""

    def send(self, status, body):
        """Answer with JSON."""
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("X-Error-Message", "no")):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def read(self):
        """Return the body."""
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        """Answer a question about a repository."""
        self.server.requests.append(("GET", self.path))
        name = re.match(r"/api/models/([^/]+/[^/?]+)", self.path)[1]
        if name in self.server.repositories:
            private = self.server.repositories[name]
            self.send(200, {"id": name, "private": private, "sha": "0" * 40, "siblings": []})
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_PUT(self):
        """Store a large file."""
        self.server.requests.append(("PUT", self.path))
        self.server.files[self.path.removeprefix("/store/")] = self.read()
        self.send(200, {})

    def do_POST(self):
        """Create a repository, or take files."""
        self.server.requests.append(("POST", self.path))
        assert self.headers["Authorization"] == "Bearer hf_made_up"
        body, server = self.read(), self.server
        if self.path == "/api/repos/create":
            if server.status == 200:
                values = json.loads(body)
                name = f"{values['organization']}/{values['name']}"
                server.repositories[name] = values.get("visibility") == "private"
            self.send(server.status, {"url": f"{server.endpoint}/{NAME}"})
        elif self.path == "/api/validate-yaml":
            self.send(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            modes = [
                {"path": n, "uploadMode": mode[n.endswith(".bin")], "shouldIgnore": False}
                for n in names
            ]
            self.send(200, {"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **entry,
                    "actions": {"upload": {"href": f"{server.endpoint}/store/{entry['oid']}"}},
                }
                for entry in json.loads(body)["objects"]
            ]
            self.send(200, {"transfer": "basic", "objects": objects})
        else:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    server.files[value["path"]] = server.files.pop(value["oid"])
            link = f"{server.endpoint}/{NAME}/commit/{'0' * 40}"
            self.send(200, {"success": True, "commitUrl": link, "commitOid": "0" * 40})


@pytest.fixture
def hub():
    """A Hub that answers until the test is done."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def exported(tmp_path):
    """A directory as an export writes it."""
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "README.md").write_text("# Model trained with ntkrl")
    (directory / "weights.bin").write_bytes(b"\0weights")
    (directory / ".ntkrl-export.json").write_text("{}")
    return directory


@pytest.fixture
def upload(hub, exported, tmp_path, monkeypatch):
    """Return a function that uploads to the made-up Hub; settings are of `huggingface_hub`."""
    for name in ("HF_OIDC_RESOURCE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def call(name=NAME, public=False):
        push.check_push(name)
        return push.push(exported, name, public)

    return call


def test_upload_to_a_new_repository(upload, hub, exported):
    """Story: a private repository with the files of the export, small and large, and no others."""
    assert upload() == f"{hub.endpoint}/{NAME} (private)"
    assert hub.repositories == {NAME: True}
    files = {path.name: path.read_bytes() for path in exported.iterdir()}
    del files[".ntkrl-export.json"]
    assert hub.files == files
    assert upload().endswith("(private)")  # again


def test_visibility(upload, hub):
    """By hand: public only where asked; a public repository is refused without --public."""
    hub.repositories[NAME] = False
    with pytest.raises(ValueError, match=f"{NAME} exists and is public; add --public"):
        upload()
    assert hub.files == {} and {method for method, _ in hub.requests} == {"GET"}
    assert upload(public=True).endswith("(public)") and "config.json" in hub.files
    assert upload("team/other", public=True).endswith("(public)")
    assert hub.repositories == {NAME: False, "team/other": False}


def test_nothing_is_sent_for_a_wrong_name(upload, hub, monkeypatch):
    """By hand: a sentence each for a name without an organisation, a wrong one, and no login."""
    for name, words in (
        ("model", r"--push=model is not the name of a repository \(it needs one slash\)"),
        ("a/b/model", r"\(it needs one slash\); expected ORG/NAME"),
        ("a b/model", r"\(Repo id must use alphanumeric"),
    ):
        with pytest.raises(ValueError, match=words):
            upload(name)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="needs a login .*; run `hf auth login`, or set HF_TOKEN"):
        upload()
    assert hub.requests == []


def test_refusals_of_the_hub(upload, hub, exported):
    """By hand: what the Hub answers, in a sentence that says what to do."""
    for status, words in (
        (401, "does not accept the token; log in again"),
        (403, "may not write there; use one with write access to team"),
        (500, "the Hub answered 500"),
    ):
        hub.status = status
        with pytest.raises(ValueError, match=words) as caught:
            upload()
        assert str(caught.value).endswith(f"{exported} is complete; the same command tries again.")
        assert "\n" not in str(caught.value)
    assert hub.files == {}


def test_no_network(upload, hub, monkeypatch):
    """By hand: no server, and the Hub's own switch."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="http://127.0.0.1:9 cannot be reached"):
        upload()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set; unset it"):
        upload()
    assert hub.requests == []


def test_command_line(upload, hub, exported, monkeypatch, capsys):
    """Story: `export --push` uploads what it wrote; a wrong name is refused before the export."""
    written = []
    monkeypatch.setattr(commands, "export", lambda *words: written.append(words))
    words = ["export", "run", str(exported)]
    assert main(words) == 0 and hub.requests == []  # never unless asked
    assert main([*words, f"--push={NAME}"]) == 0
    assert capsys.readouterr().out == f"uploaded to {hub.endpoint}/{NAME} (private)\n"
    assert written == [("run", str(exported), None)] * 2 and "config.json" in hub.files
    for wrong, message in (
        (["--push=model"], "it needs one slash"),
        (["--public"], "--public is about an upload; add --push=ORG/NAME"),
    ):
        assert main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert len(written) == 2
