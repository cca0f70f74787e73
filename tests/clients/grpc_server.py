"""A gRPC server without generated code: bytes in, bytes out.

    grpc_server.py ADDRESS CERTIFICATE KEY DIRECTORY

A call of Delete is written to DIRECTORY/requests.log.
"""

import os
import sys
from concurrent import futures

import grpc

ADDRESS, CERTIFICATE, KEY, DIRECTORY = sys.argv[1:]


def say(request, context):
    context.set_trailing_metadata((("greeted", "yes"),))
    return b"hello, " + request


def delete(_request, _context):
    with open(os.path.join(DIRECTORY, "requests.log"), "a") as log:
        log.write("gRPC Delete\n")
    return b""


def count(request, _):
    for number in range(int(request)):
        yield b"%d" % number


def read(path):
    with open(path, "rb") as file:
        return file.read()


methods = {
    "Say": grpc.unary_unary_rpc_method_handler(say),
    "Count": grpc.unary_stream_rpc_method_handler(count),
    "Delete": grpc.unary_unary_rpc_method_handler(delete),
}
server = grpc.server(futures.ThreadPoolExecutor(4))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("demo.Greeter", methods),))
credentials = grpc.ssl_server_credentials([(read(KEY), read(CERTIFICATE))])
assert server.add_secure_port(f"{ADDRESS}:443", credentials)
server.start()
print("up", flush=True)
server.wait_for_termination()
