"""Pictures behind URLs, from servers on this machine, and on standard input."""

from __future__ import annotations

import http.server
import io
import json
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastseg.cli import remote
from tests.cli.cli_cases import photo, read_labels, segmented, tree


def png(name: str = "coffee") -> bytes:
    content = io.BytesIO()
    photo(name).save(content, format="PNG")
    return content.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """By the first segment of the path, what a server may do."""

    counts: Counter[str]

    def do_GET(self) -> None:
        self.counts[self.path] += 1
        kind, _, rest = self.path[1:].partition("/")
        content = png("astronaut" if kind == "other" else "coffee")
        if kind == "redirect":
            self.send_response(302)
            left = int(rest)
            self.send_header("Location", f"/redirect/{left - 1}" if left else "/picture/a.png")
            self.end_headers()
        elif kind == "to":
            self.send_response(301)
            self.send_header("Location", rest)
            self.end_headers()
        elif kind == "absent":
            self.send_error(404)
        elif kind == "silent":
            time.sleep(1.5)
        elif kind == "page":
            self._send(b"<!doctype html><html>")
        elif kind == "pages":
            self._send(self.server.pages)
        elif kind == "short":
            self._send(content[:-100], length=len(content))
        elif kind == "slow":
            self._send(b"", length=1000)
            for _ in range(40):
                self.wfile.write(b".")
                time.sleep(0.1)
        elif kind == "endless":  # of no length known beforehand
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(bytes(1 << 16))
        else:
            self._send(content)

    def _send(self, content: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    pages = b""

    def handle_error(self, request: object, address: object) -> None:
        """Clients that leave early are what is tested."""


def serve(context: ssl.SSLContext | None = None) -> Server:
    server = Server(("127.0.0.1", 0), type("Counting", (Handler,), {"counts": Counter()}))
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    with serve() as server:
        yield server
        server.shutdown()


@pytest.fixture
def url(server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("picture/a.png", "a"),
        ("picture/a.png?size=3&x=*", "a"),
        ("picture/my%20pic%2Fture%3F.png#part", "ture_"),
        ("picture/caf\u00e9 1", "caf\u00e9 1"),
        ("picture/..%2F..", "127.0.0.1"),
        ("picture/.hidden.png", "hidden"),
        ("", "127.0.0"),  # a host, of which ".1" goes for a suffix
        ("picture/" + 300 * "x" + ".png", 196 * "x"),
        ("redirect/0", "0"),
        ("redirect/4", "4"),
    ],
)
def test_names_of_outputs(predict, url, tmp_path, model_folder, path, name):
    assert predict(f"{url}/{path}", "--json", "--no-overlay") == 0
    out = tmp_path / "out"
    names = tree(out)
    assert len(names) == 2
    if name != "127.0.0.1":
        assert names == {f"{name}.json", f"{name}_labels.png"}
    (label_map,) = out.glob("*_labels.png")
    np.testing.assert_array_equal(read_labels(label_map), segmented(model_folder, photo("coffee")))
    (content,) = out.glob("*.json")
    assert json.loads(content.read_text())["image"] == f"{url}/{path}"


def test_urls_among_files(predict, url, server, photos, tmp_path, model_folder, capsys):
    """Each is fetched once; a second run replaces its results, another URL's are kept."""
    given = [photos / "coffee.jpg", f"{url}/other/coffee.png", f"{url}/other/coffee.png"]
    for _ in range(2):
        assert predict(*given, "--no-overlay") == 0
        assert "2 of 2 images segmented" in capsys.readouterr().out
        assert tree(tmp_path / "out") == {"coffee.jpg_labels.png", "coffee.png_labels.png"}
    assert server.RequestHandlerClass.counts["/other/coffee.png"] == 2
    labels = read_labels(tmp_path / "out" / "coffee.png_labels.png")
    np.testing.assert_array_equal(labels, segmented(model_folder, photo("astronaut")))
    assert predict(f"{url}/picture/coffee.png.png", "--no-overlay") == 0
    assert "coffee.png-2_labels.png: the name is taken" in capsys.readouterr().err


REASONS = [
    ("absent/a.png", "the server answers 404 Not Found"),
    ("redirect/6", "more than 5 redirects"),
    ("to/ftp://127.0.0.1/a.png", "not allowed"),
    ("to/file:///etc/hostname", "not allowed"),
    ("silent/a.png", "no answer for 1 seconds"),
    ("slow/a.png", "not there after 2 seconds"),
    ("short/a.png", "the connection ended after "),
    ("endless/a.png", "larger than 1 MiB"),
    ("page/a.png", "a web page and not a picture"),
]


def test_urls_that_fail_are_reported_and_the_others_go_on(
    predict, url, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(remote, "SILENCE", 1.0)
    monkeypatch.setattr(remote, "SECONDS", 2.0)
    monkeypatch.setattr(remote, "MAX_MIB", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    wrong = [f"{url}/{path}" for path, _ in REASONS]
    wrong += ["http://127.0.0.1:1/a.png", "http://[", "https://host.invalid/a.png"]
    assert predict(*wrong, f"{url}/picture/a.png", "--no-overlay") == 1
    printed = capsys.readouterr()
    assert f"1 of {len(wrong) + 1} images segmented" in printed.out
    reasons = dict(zip(wrong, [reason for _, reason in REASONS], strict=False))
    for where in wrong:
        line = next(line for line in printed.err.splitlines() if line.startswith(f"{where}: "))
        assert reasons.get(where, "") in line
        assert len(line) > len(where) + 8
    assert list((tmp_path / "copies").iterdir()) == []


def test_a_copy_lasts_until_its_picture_is_read(predict, url, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    copies = []
    file = remote.Remote.file

    def count(self):
        path = file(self)
        copies.append(len(list(path.parent.iterdir())))
        return path

    monkeypatch.setattr(remote.Remote, "file", count)
    pictures = [f"{url}/picture/{number}" for number in range(4)]
    assert predict(*pictures, "--no-overlay", "--workers", 1) == 0
    assert max(copies) <= 2  # one may be read while that before is dropped


def test_a_length_above_the_limit_is_not_downloaded(predict, url, monkeypatch, capsys):
    monkeypatch.setattr(remote, "MAX_MIB", 0)
    assert predict(f"{url}/picture/a.png", "--quiet") == 1
    assert "larger than 0 MiB: fetch it into a file first" in capsys.readouterr().err


def test_pages_behind_a_url_are_downloaded_once(predict, server, url, tmp_path, model_folder):
    content = io.BytesIO()
    pages = [photo("coffee"), photo("astronaut")]
    pages[0].save(content, format="TIFF", save_all=True, append_images=pages[1:])
    server.pages = content.getvalue()
    assert predict(f"{url}/pages/scan.tif", f"{url}/absent/b", "--all-pages", "--no-overlay") == 1
    assert server.RequestHandlerClass.counts == {"/pages/scan.tif": 1, "/absent/b": 1}
    for number, page in enumerate(pages, 1):
        labels = read_labels(tmp_path / "out" / f"scan-page000{number}_labels.png")
        np.testing.assert_array_equal(labels, segmented(model_folder, page))


@pytest.fixture
def certificate(tmp_path) -> Path:
    """Self-signed, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    path = tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    key = tmp_path / "key.pem"
    command += ["-keyout", str(key), "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + key.read_bytes())
    return path


def test_https(predict, certificate, url, tmp_path, model_folder, monkeypatch, capsys):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serve(context) as server:
        safe = f"https://127.0.0.1:{server.server_port}"
        assert predict(f"{safe}/picture/a.png") == 1
        said = capsys.readouterr().err
        assert f"{safe}/picture/a.png: its certificate is not trusted: self" in said
        assert not server.RequestHandlerClass.counts
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert predict(f"{safe}/redirect/1", f"{url}/to/{safe}/picture/b", "--no-overlay") == 0
        assert predict(f"{safe}/to/{url}/picture/c") == 1
        assert f"redirected from https to {url}/picture/c" in capsys.readouterr().err
        server.shutdown()
    assert tree(tmp_path / "out") == {"1_labels.png", "b_labels.png"}
    labels = read_labels(tmp_path / "out" / "1_labels.png")
    np.testing.assert_array_equal(labels, segmented(model_folder, photo("coffee")))


def give(monkeypatch, content: bytes, terminal: bool = False) -> None:
    stream = io.TextIOWrapper(io.BytesIO(content))
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdin", stream)


def test_standard_input(predict, tmp_path, model_folder, monkeypatch, capsys):
    out = tmp_path / "out"
    for name, stem in (("coffee", "stdin"), ("astronaut", "stdin-2"), ("coffee", "stdin")):
        give(monkeypatch, png(name))
        assert predict("-", "--json", "--no-overlay") == 0
        assert "1 of 1 images segmented" in capsys.readouterr().out
        labels = read_labels(out / f"{stem}_labels.png")
        np.testing.assert_array_equal(labels, segmented(model_folder, photo(name)))
        assert json.loads((out / f"{stem}.json").read_text())["image"] == "-"
    assert len(tree(out)) == 4


def test_a_file_of_the_name_of_standard_input(predict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo("coffee").save("-", format="PNG")
    assert predict("./-", "--no-overlay") == 0
    assert tree(tmp_path / "out") == {"-_labels.png"}


@pytest.mark.parametrize(
    ("content", "terminal", "reason"),
    [
        (b"", False, "an empty file"),
        (b"no picture", False, "no image that Pillow knows"),
        (b"", True, "expected a picture on standard input, found a terminal"),
        (bytes(1 << 20) + b"1", False, "larger than 1 MiB"),
        (None, False, "standard input is closed"),
    ],
)
def test_standard_input_that_is_no_picture(
    predict, photos, monkeypatch, capsys, content, terminal, reason
):
    monkeypatch.setattr(remote, "MAX_MIB", 1)
    if content is None:
        monkeypatch.setattr(sys, "stdin", None)
    else:
        give(monkeypatch, content, terminal)
    for _ in range(2):  # where there are outputs, too, of which to know whose they are
        assert predict("-", photos / "coffee.jpg", "--no-overlay") == 1
    printed = capsys.readouterr()
    assert f"-: {reason}" in printed.err
    assert "1 of 2 images segmented" in printed.out
