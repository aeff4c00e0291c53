"""Models from the network: from a local server that breaks off, lies, or has nothing."""

import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import test_checkpoint

from fairasr_min import checkpoint, download
from fairasr_min.checkpoint import CheckpointError, load_model, load_model_file
from fairasr_min.nemo import load_nemo

ARCHIVE = Path(__file__).parent / "fixtures" / "nemo" / "extra_conformer_ctc.nemo"
CONTENT = ARCHIVE.read_bytes()
NAME = "/nvidia/some-ctc_0.6b/resolve/main/some-ctc_0.6b.nemo"


class Server(ThreadingHTTPServer):
    """Serves CONTENT at any address, in the way that `behaviour` says."""

    daemon_threads = True
    behaviour, asked = "honest", ()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        how, server = self.server.behaviour, self.server
        server.asked = (*server.asked, self.path)
        if how == "nothing there":
            return self.send_error(404)
        if how == "redirects" and self.path != "/moved.nemo":
            self.send_response(302)
            self.send_header("Location", "/moved.nemo")
            return self.end_headers()
        if how == "redirects away":
            self.send_response(302)
            self.send_header("Location", "http://example.org/model.nemo")
            return self.end_headers()
        lies = {"says more": 100, "says less": -70_000, "breaks off": 0, "stalls": 0, "a page": 0}
        content = b"<html>please log in</html>" * 20 if how == "a page" else CONTENT
        self.send_response(200)
        if how != "says nothing":
            self.send_header("Content-Length", str(len(content) + lies.get(how, 0)))
        self.end_headers()
        if how in ("breaks off", "stalls"):
            content = content[: len(content) // 2]
        self.wfile.write(content)
        if how == "stalls":
            self.wfile.flush()
            time.sleep(1)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRASR_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def kept(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("behaviour", ["honest", "redirects", "says nothing"])
def test_a_name_is_downloaded_once(server, tmp_path, behaviour):
    server.behaviour = behaviour
    model = load_model("nvidia/some-ctc_0.6b")
    assert server.asked[0] == NAME
    assert model.config == load_nemo(ARCHIVE).config
    (name,) = kept(tmp_path)
    assert name.endswith("-some-ctc_0.6b.nemo") and not name.startswith(".")
    before = len(server.asked)
    payload = load_model_file("nvidia/some-ctc_0.6b")
    assert len(server.asked) == before and payload["path"] == tmp_path / "cache" / name
    assert payload["path"].read_bytes() == CONTENT


def test_an_address_gives_our_own_files_too(server, tmp_path, monkeypatch):

    test_checkpoint.model_file(tmp_path / "model.pt")
    monkeypatch.setattr("test_download.CONTENT", (tmp_path / "model.pt").read_bytes())
    assert (
        load_model(f"{server.url}/some/where/model.pt?version=2").config == test_checkpoint.CONFIG
    )
    assert kept(tmp_path)[0].endswith("-model.pt")


@pytest.mark.parametrize(
    "behaviour, message",
    [
        ("nothing there", "answers 404"),
        ("breaks off", "after 102,400 of 204,800 bytes"),
        ("says more", "after 204,800 of 204,900 bytes"),
        ("says less", "no whole model file .*truncated"),
        ("stalls", "timed out"),
        ("a page", "no whole model file .*not a .nemo archive"),
        ("redirects away", "only https"),
    ],
)
def test_what_is_not_whole_is_not_kept_and_the_next_try_begins_anew(
    server, tmp_path, monkeypatch, behaviour, message
):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.behaviour = behaviour
    with pytest.raises(CheckpointError, match=message) as error:
        load_model("nvidia/some-ctc_0.6b")
    line = str(error.value)
    assert line.startswith("nvidia/some-ctc_0.6b: no such file; as a Hugging Face name: http")
    assert "\n" not in line and kept(tmp_path) == []
    server.behaviour = "honest"
    assert load_model("nvidia/some-ctc_0.6b").config == load_nemo(ARCHIVE).config


def test_the_command_ends_with_one_line(server, monkeypatch, capsys):
    server.behaviour = "nothing there"
    monkeypatch.setattr("sys.argv", ["checkpoint", "info", server.url + "/a.nemo"])
    assert checkpoint.main() == 2
    assert capsys.readouterr().err == (
        f"error: {server.url}/a.nemo: the server answers 404 (Not Found)\n"
    )


def test_leftovers_of_a_killed_download_go_and_those_of_a_living_one_stay(server, tmp_path):
    url = f"{server.url}/a.nemo"
    first = download.local_file(url, checkpoint._check_whole)
    old, fresh = (first.with_name(f".{first.name}.{end}") for end in ("killed", "living"))
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    first.unlink()
    assert download.local_file(url, checkpoint._check_whole) == first
    assert kept(tmp_path) == sorted([fresh.name, first.name])


@pytest.mark.parametrize(
    "source", ["http://example.org/a.nemo", "file:///etc/passwd", "ftp://localhost/a.nemo"]
)
def test_only_https_is_fetched(server, source):
    with pytest.raises(CheckpointError, match="only https"):
        load_model(source)


@pytest.mark.parametrize("source", ["runs/missing.pt", "a.nemo", "x", "a/b/c", "../up", "/a/b"])
def test_a_missing_file_is_not_looked_for_elsewhere(server, source):
    with pytest.raises(CheckpointError, match=f"^{source}: no such file$"):
        load_model(source)
    assert server.asked == ()


def test_an_unreachable_server_and_a_folder(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(CheckpointError, match="not reachable .*refused"):
        load_model("nvidia/some")
    Path("folder").mkdir()
    with pytest.raises(CheckpointError, match="a folder; name the model file"):
        load_model("folder")


def test_the_cache_is_where_the_user_says(monkeypatch):
    for name in ("FAIRASR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/one")
    assert download.cache() == Path("/home/one/.cache/fairasr_min")
    monkeypatch.setenv("XDG_CACHE_HOME", "/big/cache")
    assert download.cache() == Path("/big/cache/fairasr_min")
    monkeypatch.setenv("FAIRASR_CACHE", "/models")
    assert download.cache() == Path("/models")
