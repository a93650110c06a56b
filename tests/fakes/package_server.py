"""An https server of packages that breaks connections, redirects and lies as a test wants."""

import http.server
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fakes.certificates import Authority


@dataclass
class PackageServer:
    """A running server.

    Attributes:
        ca_file: What its certificate must come from.
        files: Content by path.
        cut: How many bytes are sent before the connection breaks, once each, in order.
        moved: Where to go instead, by path.
        ranges: Whether parts of a file can be had.
        asked: Path and Range of every request.
    """

    port: int = 0
    ca_file: Path = Path()
    files: dict[str, bytes] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    asked: list[tuple[str, str]] = field(default_factory=list)

    def url(self, path: str) -> str:
        return f"https://127.0.0.1:{self.port}{path}"


@contextmanager
def package_server(folder: Path) -> Iterator[PackageServer]:
    """Serve until the end of the block."""
    authority = Authority()
    certificate, key = authority.issue()
    ca, pem = folder / "packages-ca.pem", folder / "packages.pem"
    ca.write_bytes(authority.pem)
    pem.write_bytes(certificate + key)
    state = PackageServer(ca_file=ca)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            wanted = self.headers.get("range", "")
            state.asked.append((self.path, wanted))
            if self.path in state.moved:
                self.send_response(302)
                self.send_header("location", state.moved[self.path])
                self.send_header("content-length", "0")
                self.end_headers()
                return
            content = state.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            begin = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            if wanted and state.ranges:
                if begin >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header(
                    "content-range", f"bytes {begin}-{len(content) - 1}/{len(content)}"
                )
                content = content[begin:]
            else:
                self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            if state.cut:
                self.wfile.write(content[: state.cut.pop(0)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(content)

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # clients go away as they like

    server = Server(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
