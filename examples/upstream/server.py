#!/usr/bin/env python3
"""The example's allowed upstream: HTTPS on port 8443, with a certificate of a CA of its own.

GET /hello answers with a JSON body, /repo.git is a bare git repository for cloning, and every
other method is answered too: when one is refused, it was not the server's doing.
"""

import http.server
import json
import os
import signal
import ssl
import subprocess

PORT = 8443
CERTIFICATE = "/tls/tls.crt"
KEY = "/tls/tls.key"
ROOT = "/srv/upstream"


def make_repository(path):
    """A repository with one commit, which git clones over plain files."""
    env = dict(os.environ, GIT_DIR=path, HOME=ROOT)
    for who in ("AUTHOR", "COMMITTER"):
        env.update({f"GIT_{who}_NAME": "upstream", f"GIT_{who}_EMAIL": "upstream@example.com"})

    def git(*words, text=""):
        done = subprocess.run(["git", *words], env=env, input=text, text=True, check=True,
                              stdout=subprocess.PIPE)
        return done.stdout.strip()

    git("init", "--quiet", "--bare", "--initial-branch=main", path)
    blob = git("hash-object", "-w", "--stdin", text="cloned through the fence\n")
    tree = git("mktree", text=f"100644 blob {blob}\tREADME\n")
    git("update-ref", "refs/heads/main", git("commit-tree", tree, "-m", "first"))
    git("update-server-info")


class Upstream(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    def __init__(self, *args):
        super().__init__(*args, directory=ROOT)

    def answer(self):
        length = int(self.headers.get("Content-Length", 0))
        received = self.rfile.read(length).decode("utf-8", "replace")
        body = json.dumps({
            "hello": "from the upstream",
            "method": self.command,
            "host": self.headers.get("Host"),
            "received": received,
        }).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        if self.path.startswith("/repo.git/"):
            super().do_GET()
        else:
            self.answer()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = answer


class Server(http.server.ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("", PORT), Upstream)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(CERTIFICATE, KEY)

    def get_request(self):
        connection, address = super().get_request()
        connection.settimeout(30)
        # The handshake belongs to the connection's own thread, not to the one that accepts.
        return self.context.wrap_socket(connection, server_side=True,
                                        do_handshake_on_connect=False), address


if __name__ == "__main__":
    # The first process of a container has no default action for signals.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    make_repository(os.path.join(ROOT, "repo.git"))
    print(f"upstream: listening on port {PORT}", flush=True)
    Server().serve_forever()
