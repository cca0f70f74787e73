"""A real WebSocket server: echoes on /echo/…, pushes on /push/…, and prints what it got.

usage: echo.py ADDRESS PLAIN_PORT TLS_PORT CERTIFICATE KEY
"""

import asyncio
import json
import ssl
import sys

import websockets


async def graphql(ws, message):
    """Answers as the two protocols of GraphQL have it: three events to a subscription."""
    message = json.loads(message)
    kind, new = message["type"], ws.subprotocol == "graphql-transport-ws"
    print("graphql", kind, message.get("payload", {}).get("query"), flush=True)
    answers = {"connection_init": ["connection_ack"], "ping": ["pong"]}.get(kind, [])
    if kind in ("subscribe", "start"):
        answers = ["next" if new else "data"] * 3 + ["complete"]
    for answer in answers:
        await ws.send(json.dumps({"id": message.get("id"), "type": answer, "payload": {}}))


async def serve(ws, path=None):
    if path is None:
        path = ws.request.path if hasattr(ws, "request") else ws.path
    print("open", path, flush=True)
    if path.startswith("/push/large"):
        await ws.send(b"\x07" * (20 * 1024 * 1024))
    elif path.startswith("/push"):
        for number in range(5):
            await ws.send("number %d " % number * 100)
            await ws.send(bytes([number]) * 300)
    if path == "/push/bye":
        await ws.close(4001, "enough")
        return
    try:
        async for message in ws:
            if path == "/graphql":
                await graphql(ws, message)
                continue
            print("got", path, type(message).__name__, len(message), flush=True)
            await ws.send(message)
    except websockets.exceptions.ConnectionClosed:
        pass
    print("closed", path, ws.close_code, flush=True)


async def main():
    address, plain, secured, certificate, key = sys.argv[1:]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    options = {"max_size": None, "subprotocols": ["chat", "super", "graphql-transport-ws", "graphql-ws"], "close_timeout": 2}
    async with websockets.serve(serve, address, int(plain), **options):
        async with websockets.serve(serve, address, int(secured), ssl=context, **options):
            print("ready", flush=True)
            await asyncio.Future()


asyncio.run(main())
