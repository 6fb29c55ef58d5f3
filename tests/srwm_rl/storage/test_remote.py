"""Models from an https address: only with the sha256 that it names, once, of bounded size."""

import hashlib
import http.server
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.request import install_opener

import pytest

from srwm_rl import UserError, load
from srwm_rl.storage import remote
from srwm_rl.storage.run_folder import title_of
from srwm_rl.zoo import zoo_file

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")


class Server(http.server.ThreadingHTTPServer):
    """Serves one content at any path over https, and counts the requests."""

    content = b""
    n_requests = 0


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the server's content."""

    server: Server

    def do_GET(self) -> None:
        self.server.n_requests += 1
        self.send_response(200 if self.path == "/agent.safetensors" else 404)
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("certificate")
    files = folder / "cert.pem", folder / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run([*command.split(), "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files


@pytest.fixture
def server(certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install_opener(None)  # Python 3.13's keeps the certificates of its first use
    server = Server(("localhost", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def address(server: Server, digest: str, path: str = "agent.safetensors") -> str:
    return f"https://localhost:{server.server_port}/{path}#sha256={digest}"


def test_an_agent_is_downloaded_once_and_checked(server: Server) -> None:
    server.content = zoo_file("recall").read_bytes()
    where = address(server, hashlib.sha256(server.content).hexdigest())
    assert load(where).card == load("zoo:recall").card
    assert load(where).num_timesteps == load("zoo:recall").num_timesteps
    assert server.n_requests == 1, "the second one came from the cache"
    assert title_of(where) == "agent"


def test_a_damaged_file_in_the_cache_is_downloaded_again(server: Server, tmp_path: Path) -> None:
    server.content = zoo_file("recall").read_bytes()
    digest = hashlib.sha256(server.content).hexdigest()
    for damaged in (server.content[:-1], b""):
        file = remote.fetch(address(server, digest))
        file.write_bytes(damaged)
        assert remote.fetch(address(server, digest)).read_bytes() == server.content
    assert server.n_requests == 3


@pytest.mark.parametrize("in_the_way", ["cache", "cache/srwm-rl"])
def test_a_cache_that_cannot_be_written_is_one_line(in_the_way: str, server: Server, tmp_path: Path) -> None:
    server.content = zoo_file("recall").read_bytes()
    (tmp_path / in_the_way).parent.mkdir(exist_ok=True)
    (tmp_path / in_the_way).write_text("a file")
    with pytest.raises(UserError, match=r"cannot write a download to .*srwm-rl: .*; set XDG_CACHE_HOME") as error:
        remote.fetch(address(server, hashlib.sha256(server.content).hexdigest()))
    assert "\n" not in str(error.value)


def test_another_content_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    server.content = zoo_file("recall").read_bytes()
    with pytest.raises(UserError, match=r"has sha256 4.*not the 0000.* it is not used"):
        load(address(server, "0" * 64))
    assert not (tmp_path / "cache").exists()


def test_too_much_is_not_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.content = bytes(1001)
    monkeypatch.setattr(remote, "MAX_DOWNLOAD", 1000)
    with pytest.raises(UserError, match="more than the 1,000 bytes"):
        load(address(server, hashlib.sha256(server.content).hexdigest()))


def test_what_cannot_be_had_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"cannot download .*Not Found"):
        load(address(server, "0" * 64, "nothing"))
    monkeypatch.delenv("SSL_CERT_FILE")
    install_opener(None)
    with pytest.raises(UserError, match=r"cannot download .*CERTIFICATE_VERIFY_FAILED"):
        load(address(server, "0" * 64))
    assert server.n_requests == 1


@pytest.mark.parametrize(
    "where",
    [
        "http://localhost/a#sha256=" + "0" * 64,
        "https://localhost/a",
        "https://localhost/a#sha256=0",
        "file:///etc/passwd",
    ],
)
def test_only_https_addresses_with_a_sha256_are_read(where: str) -> None:
    with pytest.raises(UserError, match=r"an address is https://...#sha256=HEX"):
        load(where)
