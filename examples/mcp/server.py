#!/usr/bin/env python3
"""Plays an MCP server beside the agent: JSON-RPC over HTTP on port 8090 of the pod.

It says who called, so that one can see that a call came through the proxy and not from the fence.
"""

import http.server
import json
import os
import signal

PORT = 8090


class Mcp(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        length = int(self.headers.get("Content-Length", 0))
        try:
            call = json.loads(self.rfile.read(length) or b"{}")
        except ValueError:
            call = {}
        body = json.dumps({
            "jsonrpc": "2.0",
            "id": call.get("id") if isinstance(call, dict) else None,
            "result": {"serverInfo": {"name": "example-mcp"}, "caller": self.client_address[0]},
        }).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer


if __name__ == "__main__":
    # The first process of a container has no default action for signals.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print(f"mcp: listening on port {PORT}", flush=True)
    http.server.ThreadingHTTPServer(("", PORT), Mcp).serve_forever()
