"""The outside world of tests/clients: real servers for real clients, with Python's standard library.

    upstream.py ADDRESS CERTIFICATE KEY DIRECTORY

HTTPS on ADDRESS:443, told apart by the name in Host; DNS on ADDRESS:53, where every name under
`.test` is ADDRESS (grpc.test and judged.test are the next one). Each request is written to DIRECTORY/requests.log
as `HOST METHOD PATH` before it is answered: what the fence refused is not there.
"""

import base64
import gzip
import hashlib
import http.server
import io
import ipaddress
import json
import os
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import urllib.parse
import zipfile

ADDRESS, CERTIFICATE, KEY, DIRECTORY = sys.argv[1:]
NAME, MODULE, VERSION = "ringfence-demo", "ringfence_demo", "1.0.0"
GO_MODULE, GO_VERSION = "ringfence.test/demo", "v1.0.0"
#: What wget and curl fetch: a mebibyte that no cut-off or doubled copy could pass for.
DATA = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(32768))


def archive(members, mode):
    """A tar file of {name: text}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


def zipped(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return out.getvalue()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def files():
    return {"/data.bin": ("application/octet-stream", DATA)}


def python_index():
    """PEP 503, with one wheel."""
    info = f"{MODULE}-{VERSION}.dist-info"
    members = {
        f"{MODULE}.py": 'GREETING = "hello from the wheel"\n',
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        "{},sha256={},{}\n".format(
            name,
            base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("="),
            len(text),
        )
        for name, text in members.items()
    )
    members[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    wheel, file = zipped(members), f"{MODULE}-{VERSION}-py3-none-any.whl"
    page = f'<!DOCTYPE html><a href="/files/{file}#sha256={sha256(wheel)}">{file}</a>'
    return {
        f"/simple/{NAME}/": ("text/html", page.encode()),
        f"/files/{file}": ("application/octet-stream", wheel),
    }


def npm_registry():
    package = {"name": NAME, "version": VERSION, "main": "index.js"}
    tarball = archive(
        {
            "package/package.json": json.dumps(package),
            "package/index.js": 'module.exports = "hello from the package";\n',
        },
        "w:gz",
    )
    path = f"/{NAME}/-/{NAME}-{VERSION}.tgz"
    digest = base64.b64encode(hashlib.sha512(tarball).digest()).decode()
    package["dist"] = {
        "tarball": f"https://npm.test{path}",
        "shasum": hashlib.sha1(tarball).hexdigest(),
        "integrity": f"sha512-{digest}",
    }
    document = {"name": NAME, "dist-tags": {"latest": VERSION}, "versions": {VERSION: package}}
    return {
        f"/{NAME}": ("application/json", json.dumps(document).encode()),
        path: ("application/octet-stream", tarball),
    }


def cargo_registry():
    """A sparse registry."""
    manifest = f'[package]\nname = "{NAME}"\nversion = "{VERSION}"\nedition = "2021"\n'
    crate = archive(
        {
            f"{NAME}-{VERSION}/Cargo.toml": manifest,
            f"{NAME}-{VERSION}/src/lib.rs": 'pub const GREETING: &str = "hello from the crate";\n',
        },
        "w:gz",
    )
    config = {"dl": "https://crates.test/dl/{crate}-{version}.crate", "api": "https://crates.test"}
    entry = {"name": NAME, "vers": VERSION, "deps": [], "cksum": sha256(crate), "features": {}, "yanked": False}
    return {
        "/index/config.json": ("application/json", json.dumps(config).encode()),
        f"/index/{NAME[:2]}/{NAME[2:4]}/{NAME}": ("text/plain", json.dumps(entry).encode() + b"\n"),
        f"/dl/{NAME}-{VERSION}.crate": ("application/octet-stream", crate),
    }


def go_proxy():
    modfile = f"module {GO_MODULE}\n\ngo 1.16\n"
    prefix = f"{GO_MODULE}@{GO_VERSION}/"
    source = 'package demo\n\nfunc Greeting() string { return "hello from the module" }\n'
    info = {"Version": GO_VERSION, "Time": "2024-01-01T00:00:00Z"}
    base = f"/{GO_MODULE}/@v/{GO_VERSION}"
    return {
        f"/{GO_MODULE}/@v/list": ("text/plain", GO_VERSION.encode() + b"\n"),
        f"/{GO_MODULE}/@latest": ("application/json", json.dumps(info).encode()),
        f"{base}.info": ("application/json", json.dumps(info).encode()),
        f"{base}.mod": ("text/plain", modfile.encode()),
        f"{base}.zip": ("application/zip", zipped({prefix + "go.mod": modfile, prefix + "demo.go": source})),
    }


def apt_repository():
    """One suite with one package, made without dpkg's own tools."""
    control = f"Package: {NAME}\nVersion: {VERSION}\nArchitecture: all\nMaintainer: nobody <nobody@apt.test>\n"
    control += "Description: hello from the package\n"
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": archive({"./control": control}, "w:gz"),
        "data.tar.gz": archive({f"./usr/share/{NAME}": "hello from the archive\n"}, "w:gz"),
    }
    deb = b"!<arch>\n"
    for name, data in parts.items():
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        deb += data + b"\n" * (len(data) % 2)
    pool = f"pool/{NAME}_{VERSION}_all.deb"
    packages = f"{control}Filename: {pool}\nSize: {len(deb)}\nSHA256: {sha256(deb)}\n\n".encode()
    packed = gzip.compress(packages)
    lists = {"main/binary-all/Packages": packages, "main/binary-all/Packages.gz": packed}
    release = "Suite: stable\nCodename: stable\nComponents: main\nArchitectures: all\n"
    release += "Date: Mon, 01 Jan 2024 00:00:00 UTC\nSHA256:\n"
    release += "".join(f" {sha256(data)} {len(data)} {name}\n" for name, data in lists.items())
    found = {f"/debian/dists/stable/{name}": data for name, data in lists.items()}
    found["/debian/dists/stable/Release"] = release.encode()
    found[f"/debian/{pool}"] = deb
    return {path: ("application/octet-stream", data) for path, data in found.items()}


def git_repository():
    """A bare repository with one commit, that takes pushes."""
    path = os.path.join(DIRECTORY, "git", "demo.git")
    work = os.path.join(DIRECTORY, "git-work")

    def git(*words):
        identity = ["-c", "user.name=test", "-c", "user.email=test@git.test", "-c", "init.defaultBranch=main"]
        environment = {"PATH": os.environ["PATH"], "HOME": DIRECTORY}
        subprocess.run(["git", *identity, *words], check=True, env=environment, stdout=subprocess.DEVNULL)

    git("init", "-q", "--bare", path)
    git("-C", path, "config", "http.receivepack", "true")
    git("init", "-q", work)
    with open(os.path.join(work, "README"), "w") as file:
        file.write("hello from the repository\n")
    git("-C", work, "add", "README")
    git("-C", work, "commit", "-q", "-m", "first")
    git("-C", work, "push", "-q", path, "HEAD:main")


STATIC = {
    "files.test": files(),
    "pypi.test": python_index(),
    "npm.test": npm_registry(),
    "crates.test": cargo_registry(),
    "goproxy.test": go_proxy(),
    "apt.test": apt_repository(),
    "s3.test": {"/bucket/data.bin": ("application/octet-stream", DATA)},
}
LOG = threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "upstream"

    def handle_any(self):
        host = self.headers.get("Host", "").split(":")[0]
        path, _, query = self.path.partition("?")
        with LOG, open(os.path.join(DIRECTORY, "requests.log"), "a") as log:
            log.write(f"{host} {self.command} {self.path}\n")
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        body = self.body()
        if host in ("git.test", "forge.test"):
            return self.git(urllib.parse.unquote(path), query, body)
        if host == "api.test":
            seen = {"method": self.command, "path": self.path, "body": body.decode()}
            return self.answer(200, "application/json", json.dumps(seen).encode())
        kind, data = STATIC.get(host, {}).get(urllib.parse.unquote(path), (None, None))
        if self.command not in ("GET", "HEAD"):
            return self.answer(201, "application/json", b'{"ok": true}')
        if data is None:
            return self.answer(404, "text/plain", b"no such thing\n")
        return self.answer(200, kind, data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline() not in (b"\r\n", b"\n", b""):
                pass
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def git(self, path, query, body):
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": DIRECTORY,
            "GIT_PROJECT_ROOT": os.path.join(DIRECTORY, "git"),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "REMOTE_ADDR": self.client_address[0],
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
        }
        done = subprocess.run(["git", "http-backend"], input=body, env=environment, stdout=subprocess.PIPE)
        head, _, data = done.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
        self.answer(int(fields.get("Status", "200").split()[0]), fields.get("Content-Type", "text/plain"), data)

    def answer(self, status, kind, data):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def finish_request(self, request, client_address):
        # In the connection's own thread: a client that says nothing holds up nobody.
        try:
            with TLS.wrap_socket(request, server_side=True) as stream:
                self.RequestHandlerClass(stream, client_address, self)
        except OSError:
            pass


def serve_dns():
    """Answers A for names under .test; what it does not know does not exist."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((ADDRESS, 53))
    while True:
        query, peer = sock.recvfrom(1500)
        end, labels = 12, []
        while length := query[end]:
            labels.append(query[end + 1 : end + 1 + length].decode().lower())
            end += length + 1
        question, kind = query[12 : end + 5], query[end + 1 : end + 3]
        known = len(labels) == 2 and labels[1] == "test"
        ip = ipaddress.ip_address(ADDRESS) + (labels[0] in ("grpc", "judged")) if known else None
        answers = [b"\xc0\x0c\x00\x01\x00\x01\0\0\0\x1e\0\x04" + ip.packed] if known and kind == b"\0\x01" else []
        head = query[:2] + (b"\x81\x80" if known else b"\x81\x83")
        counts = b"\0\x01" + len(answers).to_bytes(2, "big") + b"\0\0\0\0"
        sock.sendto(head + counts + question + b"".join(answers), peer)


TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
TLS.load_cert_chain(CERTIFICATE, KEY)
TLS.set_alpn_protocols(["http/1.1"])
git_repository()
threading.Thread(target=serve_dns, daemon=True).start()
server = Server((ADDRESS, 443), Handler)
print("up", flush=True)
server.serve_forever()
