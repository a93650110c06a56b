"""Serve the files of a folder by https.

    https_files.py ADDRESS PORT FOLDER CERTIFICATE KEY

Imports nothing of the project: it is started as a script of its own, in a machine's network
namespace.
"""

from __future__ import annotations

import functools
import http.server
import ssl
import sys


def main() -> None:
    """Serve until killed."""
    address, port, folder, certificate, key = sys.argv[1:]
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with http.server.ThreadingHTTPServer((address, int(port)), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
