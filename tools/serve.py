"""Serve a folder on localhost: ``python tools/serve.py FOLDER [PORT]``."""

import errno
import functools
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

FIRST_PORT, LAST_PORT = 8000, 8019


class Server(ThreadingHTTPServer):
    # With the default, a port that another server holds is not refused everywhere.
    allow_reuse_address = False


def main(folder, port=None):
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    if port and not (port.isdecimal() and 0 < int(port) < 65536):
        print(f"Error: PORT={port} is not a port number, 1 to 65535.", file=sys.stderr)
        return 1
    ports = [int(port)] if port else range(FIRST_PORT, LAST_PORT + 1)
    for number in ports:
        try:
            server = Server(("127.0.0.1", number), handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            continue
        with server:
            print(f"The book is at http://localhost:{server.server_port}/ (stop with Ctrl+C)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()
            return 0
    tried = str(ports[0]) if len(ports) == 1 else f"{ports[0]} to {ports[-1]}"
    print(f"Error: port {tried} is taken or not allowed; choose another: make serve PORT=8080", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
