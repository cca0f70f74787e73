"""A real WebSocket client behind the proxy.

usage: client.py URL CA COMPRESSION WHAT
COMPRESSION is no, takeover or alone (no context takeover). WHAT says what it does.
"""

import asyncio
import json
import socket
import ssl
import sys
from urllib.parse import urlsplit

import websockets
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory

PROXY = ("10.200.0.1", 3128)


def tunnel(host, port):
    sock = socket.create_connection(PROXY)
    authority = "%s:%d" % (host, port)
    sock.sendall(("CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (authority, authority)).encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        assert byte, head
        head += byte
    assert head.startswith(b"HTTP/1.1 200 "), head
    sock.setblocking(False)
    return sock


async def echo(ws):
    """Every length form, fragments, text that compresses and text that repeats."""
    sizes = [0, 1, 125, 126, 127, 65535, 65536, 1_000_000, 4 * 1024 * 1024]
    texts = ["x" * size for size in sizes]
    texts += ["l\u00f6ng \U0001f600 %d " % number * 50 for number in range(40)]
    count = 0
    for text in texts:
        await ws.send(text)
        assert await ws.recv() == text, len(text)
        count += 1
    # Many at once: they come back whole and in order.
    many = ["message %d" % number for number in range(500)]

    async def send():
        for text in many:
            await ws.send(text)

    sending = asyncio.ensure_future(send())
    for text in many:
        assert await ws.recv() == text
        count += 1
    await sending
    for number in range(5):
        await ws.send(part for part in ["frag", "", "ments \u00e9", " ", str(number)])
        assert await ws.recv() == "fragments \u00e9 %d" % number
        await (await ws.ping("p%d" % number))
        count += 1
    return "echoed %d" % count


async def binary(ws):
    for size in [0, 1, 70_000]:
        await ws.send(b"\xff" * size)
        assert await ws.recv() == b"\xff" * size
    return "binary"


async def push(ws):
    for number in range(5):
        assert await ws.recv() == "number %d " % number * 100
        assert await ws.recv() == bytes([number]) * 300
    return "pushed"


async def large(ws):
    assert len(await ws.recv()) == 20 * 1024 * 1024
    await (await ws.ping())
    return "large"


async def closed(ws):
    async for _ in ws:
        pass
    return "closed"


async def text(ws):
    await ws.send("secret text")
    return "answered " + await ws.recv()


async def bytes_(ws):
    await ws.send(b"secret bytes")
    return "answered %s" % await ws.recv()


async def flood(ws):
    """Much more than is read before it is refused."""
    async def send():
        for _ in range(80):
            await ws.send("secret " * 15_000)

    sending = asyncio.ensure_future(send())
    try:
        return "answered %d" % len(await ws.recv())
    finally:
        sending.cancel()


async def graphql(ws):
    """A subscription, as its clients speak, and then what no rule allows."""
    start = "subscribe" if ws.subprotocol == "graphql-transport-ws" else "start"

    async def say(**message):
        await ws.send(json.dumps(message))

    async def hear():
        return json.loads(await ws.recv())["type"]

    await say(type="connection_init", payload={"token": "x"})
    assert await hear() == "connection_ack"
    if start == "subscribe":
        await say(type="ping")
        assert await hear() == "pong"
    await say(id="1", type=start, payload={"query": "subscription Ticks { ticks }"})
    heard = [await hear() for _ in range(4)]
    assert heard[3] == "complete", heard
    print("heard", *heard)
    await say(id="2", type=start, payload={"query": "mutation { secretDeleteAll }"})
    return "answered " + await ws.recv()


async def graphql_bytes(ws):
    """Some servers read text in binary messages."""
    await ws.send(json.dumps({"type": "connection_init"}).encode())
    return "answered %s" % await ws.recv()


async def huge(ws):
    await ws.send("x" * (4 * 1024 * 1024 + 1))
    return "answered %d" % len(await ws.recv())


WHAT = {
    "echo": echo, "binary": binary, "push": push, "large": large, "closed": closed,
    "text": text, "bytes": bytes_, "huge": huge, "flood": flood,
    "graphql-transport-ws": graphql, "graphql-ws": graphql, "graphql-bytes": graphql_bytes,
}


async def main():
    url, ca, compression, what = sys.argv[1:]
    parts = urlsplit(url)
    secured = {}
    if parts.scheme == "wss":
        context = ssl.create_default_context(cafile=ca)
        secured = {"ssl": context, "server_hostname": parts.hostname}
    extensions = {
        "no": [],
        "takeover": [ClientPerMessageDeflateFactory(client_max_window_bits=True)],
        "alone": [
            ClientPerMessageDeflateFactory(
                client_no_context_takeover=True, server_no_context_takeover=True
            )
        ],
    }[compression]
    subprotocols = [what] if what in ("graphql-transport-ws", "graphql-ws") else ["super", "other"]
    try:
        ws = await websockets.connect(
            url, sock=tunnel(parts.hostname, parts.port), **secured, compression=None,
            extensions=extensions, subprotocols=subprotocols, max_size=None, open_timeout=20,
        )
    except websockets.exceptions.WebSocketException as error:
        print("refused", error)
        return
    extensions = ws.extensions if hasattr(ws, "extensions") else ws.protocol.extensions
    agreed = [repr(one) for one in extensions]
    try:
        print(await asyncio.wait_for(WHAT[what](ws), 60), ws.subprotocol, *agreed)
        await ws.close()
    except websockets.exceptions.ConnectionClosed:
        pass
    print("end", ws.close_code, ws.close_reason)


asyncio.run(main())
