#!/usr/bin/env python3
"""An agent that knows nothing of Ringfence: an HTTP API on port 8001.

GET /health says ok, GET /whoami tells who and where the process is, POST / answers with what was
sent. SIGTERM ends it at once with exit code 7, so that one can see whose exit code a pod reports.
"""

import http.server
import json
import os
import signal
import threading
import time

PORT = 8001
END_CODE = 7
ALIVE_EVERY = 30  # seconds


def whoami():
    with open("/proc/self/status", encoding="ascii") as status:
        lines = dict(line.rstrip("\n").split(":\t", 1) for line in status if ":\t" in line)
    return {
        "uid": os.getuid(),
        "gid": os.getgid(),
        "groups": os.getgroups(),
        "home": os.environ.get("HOME"),
        "network": os.readlink("/proc/self/ns/net"),
        "capabilities": lines["CapEff"],
        "no_new_privs": lines["NoNewPrivs"],
        "seccomp": lines["Seccomp"],
        "mcp": os.environ.get("AMBIENT_MCP_URL"),
    }


class Api(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, value):
        body = json.dumps(value).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/health":
            self.answer(200, {"status": "ok"})
        elif self.path == "/whoami":
            self.answer(200, whoami())
        else:
            self.answer(404, {"error": "not found"})

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        self.answer(200, {"received": self.rfile.read(length).decode("utf-8", "replace")})

    def log_message(self, *_):
        """Probes would fill the log."""


def end(*_):
    print(f"agent: told to end, ending with code {END_CODE}", flush=True)
    os._exit(END_CODE)


def main():
    signal.signal(signal.SIGTERM, end)
    server = http.server.ThreadingHTTPServer(("", PORT), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"agent: listening on port {PORT}, {json.dumps(whoami())}", flush=True)
    while True:
        time.sleep(ALIVE_EVERY)
        print("agent: alive", flush=True)


if __name__ == "__main__":
    main()
