//! The clients: what each does through the fence, and what it is told where the policy says no.
//!
//! Scripts run with `set -e` in an empty directory that is their HOME. They set what a user of the
//! client sets (which registry, which repository) and nothing for the fence's sake.

/// A client.
pub struct Client {
    pub name: &'static str,
    /// Without this program the client is skipped.
    pub program: &'static str,
    /// Prints its version, as a script.
    pub version: &'static str,
    pub finds: Finds,
    /// What the fence sets by which the client trusts it.
    pub trusts: &'static str,
    pub works: Works,
    pub refused: Refused,
}

/// How a client finds the proxy.
pub enum Finds {
    /// By this variable.
    Proxy(&'static str),
    /// It does not: its connections are caught.
    Nothing,
}

/// Something that must succeed.
pub struct Works {
    /// In words, for the page.
    pub what: &'static str,
    pub script: &'static str,
    /// What it prints last.
    pub prints: &'static str,
}

/// Something that must not.
pub struct Refused {
    pub what: &'static str,
    pub script: &'static str,
    /// Part of the line that the client prints about it, which the page shows whole.
    pub says: &'static str,
    /// Words of one line of the fence's log.
    pub log: &'static [&'static str],
    /// What must not have reached the servers: how a line of their log begins.
    pub never: &'static str,
}

/// SHA-256 of what `upstream.py` serves as data.bin.
macro_rules! data_digest {
    () => {
        "5905cb882b14d26f9038a8543f7492ea6a9042069454712609c43ab8d04f2fbd"
    };
}

/// A commit, made by a user who has a name.
macro_rules! commit {
    ($url:literal) => {
        concat!(
            "git clone -q ",
            $url,
            " demo; cd demo; echo more >>README; ",
            "git -c user.name=a -c user.email=a@b commit -qam more; "
        )
    };
}

macro_rules! cargo_project {
    () => {
        r#"export CARGO_HOME=$HOME/cargo; mkdir -p src .cargo
        printf '[registries.demo]\nindex = "sparse+https://crates.test/index/"\n' >.cargo/config.toml
        printf '[package]\nname = "own"\nversion = "0.1.0"\nedition = "2021"\ndescription = "own"\nlicense = "MIT"\n' >Cargo.toml
        echo 'fn main() {}' >src/main.rs
        "#
    };
}

macro_rules! apt {
    ($host:literal, $command:literal) => {
        concat!(
            "mkdir -p apt/etc/apt apt/var/lib/apt/lists/partial apt/var/lib/dpkg \
             apt/var/cache/apt/archives/partial; : >apt/var/lib/dpkg/status; \
             echo 'deb [trusted=yes] https://",
            $host,
            "/debian stable main' >apt/etc/apt/sources.list; ",
            "apt-get -q -o Dir=$HOME/apt ",
            $command
        )
    };
}

macro_rules! s3 {
    () => {
        "export AWS_ACCESS_KEY_ID=a AWS_SECRET_ACCESS_KEY=b AWS_DEFAULT_REGION=c; python3 -c 'import boto3
s3 = boto3.client(\"s3\", endpoint_url=\"https://s3.test\")
"
    };
}

pub const CLIENTS: &[Client] = &[
    Client {
        name: "curl",
        program: "curl",
        version: "curl --version | cut -d' ' -f1,2",
        finds: Finds::Proxy("HTTPS_PROXY"),
        trusts: "CURL_CA_BUNDLE",
        works: Works {
            what: "downloads a file",
            script: "curl -fsS https://files.test/data.bin | sha256sum",
            prints: concat!(data_digest!(), "  -"),
        },
        refused: Refused {
            what: "DELETE where only reading is allowed",
            script: "curl -fsS -X DELETE https://files.test/data.bin",
            says: "error: 403",
            log: &["DELETE", "files.test"],
            never: "files.test DELETE",
        },
    },
    Client {
        name: "wget",
        program: "wget",
        version: "wget --version | cut -d' ' -f1-3",
        finds: Finds::Proxy("https_proxy"),
        trusts: "SYSTEM_WGETRC",
        works: Works {
            what: "downloads a file",
            script: "wget -nv https://files.test/data.bin; sha256sum <data.bin",
            prints: concat!(data_digest!(), "  -"),
        },
        refused: Refused {
            what: "a host that the policy does not have",
            script: "wget -nv --tries=1 https://elsewhere.test/data.bin",
            says: "roxy",
            log: &["elsewhere.test:443", "no policy allows"],
            never: "elsewhere.test",
        },
    },
    Client {
        name: "git clone",
        program: "git",
        version: "git --version",
        finds: Finds::Proxy("https_proxy"),
        trusts: "GIT_SSL_CAINFO",
        works: Works {
            what: "clones and fetches",
            script: "git clone -q https://git.test/demo.git; cd demo; git pull -q; cat README",
            prints: "hello from the repository",
        },
        refused: Refused {
            what: "push where only clone is allowed",
            script: concat!(commit!("https://git.test/demo.git"), "git push -q origin HEAD:main"),
            says: "error: 403",
            log: &["git.test", "/demo.git/info/refs", "no rule"],
            never: "git.test GET /demo.git/info/refs?service=git-receive-pack",
        },
    },
    Client {
        name: "git push",
        program: "git",
        version: "git --version",
        finds: Finds::Proxy("https_proxy"),
        trusts: "GIT_SSL_CAINFO",
        works: Works {
            what: "clones, commits, pushes, and finds it in the next clone",
            script: concat!(
                commit!("https://forge.test/demo.git"),
                "head -c 3000000 /dev/urandom >large; git add large; ",
                "git -c user.name=a -c user.email=a@b commit -qm large; ",
                "branch=pushed-$(basename $HOME); git push -q origin HEAD:$branch; cd ..; ",
                "git clone -q -b $branch https://forge.test/demo.git again; ",
                "cmp demo/large again/large; tail -n 1 again/README"
            ),
            prints: "more",
        },
        refused: Refused {
            what: "another repository of the same host",
            script: "git clone -q https://forge.test/other.git",
            says: "error: 403",
            log: &["forge.test", "/other.git/info/refs", "no rule"],
            never: "forge.test GET /other.git",
        },
    },
    Client {
        name: "pip",
        program: "pip",
        version: "pip --version | cut -d' ' -f1,2",
        finds: Finds::Proxy("HTTPS_PROXY"),
        trusts: "PIP_CERT",
        works: Works {
            what: "installs a wheel",
            script: "export PIP_INDEX_URL=https://pypi.test/simple; \
                     pip install -q --target lib ringfence-demo; \
                     PYTHONPATH=lib python3 -c 'import ringfence_demo as r; print(r.GREETING)'",
            prints: "hello from the wheel",
        },
        refused: Refused {
            what: "an index that the policy does not have",
            script: "export PIP_INDEX_URL=https://elsewhere.test/simple; \
                     pip install --retries 1 --target lib ringfence-demo",
            says: "Tunnel connection failed: 403",
            log: &["elsewhere.test:443", "no policy allows"],
            never: "elsewhere.test",
        },
    },
    Client {
        name: "uv",
        program: "uv",
        version: "uv --version | cut -d' ' -f1,2",
        finds: Finds::Proxy("HTTPS_PROXY"),
        trusts: "SSL_CERT_FILE",
        works: Works {
            what: "installs a wheel",
            script: "export UV_DEFAULT_INDEX=https://pypi.test/simple; \
                     uv pip install -q --target lib ringfence-demo; \
                     PYTHONPATH=lib python3 -c 'import ringfence_demo as r; print(r.GREETING)'",
            prints: "hello from the wheel",
        },
        refused: Refused {
            what: "an index that the policy does not have",
            script: "export UV_DEFAULT_INDEX=https://elsewhere.test/simple UV_HTTP_RETRIES=0; \
                     uv pip install -q --target lib ringfence-demo",
            says: "tunnel error",
            log: &["elsewhere.test:443", "no policy allows"],
            never: "elsewhere.test",
        },
    },
    Client {
        name: "npm",
        program: "npm",
        version: "echo npm $(npm --version)",
        finds: Finds::Proxy("HTTPS_PROXY"),
        trusts: "NPM_CONFIG_CAFILE",
        works: Works {
            what: "installs a package",
            script: "export NPM_CONFIG_REGISTRY=https://npm.test; \
                     npm install --loglevel error ringfence-demo >/dev/null; \
                     node -p 'require(\"ringfence-demo\")'",
            prints: "hello from the package",
        },
        refused: Refused {
            what: "publish where only reading is allowed",
            script: "export NPM_CONFIG_REGISTRY=https://npm.test; mkdir own; cd own; \
                     echo '{ \"name\": \"own\", \"version\": \"1.0.0\" }' >package.json; \
                     echo '//npm.test/:_authToken=token' >../.npmrc; npm publish",
            says: "no rule allows this request - PUT",
            log: &["PUT", "npm.test", "no rule"],
            never: "npm.test PUT",
        },
    },
    Client {
        name: "cargo",
        program: "cargo",
        version: "cargo --version | cut -d' ' -f1,2",
        finds: Finds::Proxy("https_proxy"),
        trusts: "CARGO_HTTP_CAINFO",
        works: Works {
            what: "builds and runs with a crate of a sparse registry",
            script: concat!(
                cargo_project!(),
                "cargo add -q --registry demo ringfence-demo; \
                 echo 'fn main() { println!(\"{}\", ringfence_demo::GREETING) }' >src/main.rs; \
                 cargo run -q"
            ),
            prints: "hello from the crate",
        },
        refused: Refused {
            what: "publish where only reading is allowed",
            script: concat!(
                cargo_project!(),
                "CARGO_REGISTRIES_DEMO_TOKEN=token cargo publish -q --no-verify --registry demo"
            ),
            says: "got 403",
            log: &["PUT", "crates.test", "no rule"],
            never: "crates.test PUT",
        },
    },
    Client {
        name: "go",
        program: "go",
        version: "go version | cut -d' ' -f3",
        finds: Finds::Proxy("HTTPS_PROXY"),
        trusts: "SSL_CERT_FILE",
        works: Works {
            what: "gets a module",
            script: "export GOPROXY=https://goproxy.test GONOSUMDB=*; \
                     go mod init own; go get ringfence.test/demo@latest; \
                     cat $(go list -m -f '{{.Dir}}' ringfence.test/demo)/demo.go | tail -n 1",
            prints: "func Greeting() string { return \"hello from the module\" }",
        },
        refused: Refused {
            what: "a proxy of modules that the policy does not have",
            script: "export GOPROXY=https://elsewhere.test GONOSUMDB=*; \
                     go mod init own; go get ringfence.test/demo@latest",
            says: "Forbidden",
            log: &["elsewhere.test:443", "no policy allows"],
            never: "elsewhere.test",
        },
    },
    Client {
        name: "apt",
        program: "apt-get",
        version: "apt-get --version | cut -d' ' -f1,2",
        finds: Finds::Proxy("https_proxy"),
        trusts: "APT_CONFIG",
        works: Works {
            what: "reads an archive's lists and downloads a package; the agent is not root, so its \
                   lists lie in its own directory and nothing is installed",
            script: concat!(
                apt!("apt.test", "update"),
                " >&2; apt-get -q -o Dir=$HOME/apt download ringfence-demo >&2; \
                 dpkg-deb --fsys-tarfile ringfence-demo_1.0.0_all.deb | tar -xO"
            ),
            prints: "hello from the archive",
        },
        refused: Refused {
            what: "an archive that the policy does not have",
            script: apt!("elsewhere.test", "-o APT::Update::Error-Mode=any update"),
            says: "403",
            log: &["elsewhere.test:443", "no policy allows"],
            never: "elsewhere.test",
        },
    },
    Client {
        name: "Node fetch",
        program: "node",
        version: "echo Node $(node --version)",
        finds: Finds::Nothing,
        trusts: "NODE_EXTRA_CA_CERTS",
        works: Works {
            what: "GET, and POST of 1 MB",
            script: "node -e 'const url = \"https://api.test/v1/items\";
                     fetch(url).then(r => r.json()).then(seen => console.log(seen.method));
                     fetch(url, { method: \"POST\", body: \"x\".repeat(1e6) }).then(r => r.json())
                     .then(seen => console.log(seen.method, seen.body.length))' | sort",
            prints: "POST 1000000",
        },
        refused: Refused {
            what: "DELETE, which the rules do not have",
            script: "node -e 'fetch(\"https://api.test/v1/items\", { method: \"DELETE\" })
                     .then(r => r.text()).then(t => { console.error(t); process.exit(1) })'",
            says: "policy_denied",
            log: &["DELETE", "api.test", "no rule"],
            never: "api.test DELETE",
        },
    },
    Client {
        name: "Deno",
        program: "deno",
        version: "deno --version | cut -d' ' -f1,2",
        finds: Finds::Proxy("HTTPS_PROXY"),
        trusts: "DENO_CERT",
        works: Works {
            what: "GET, and POST of 1 MB",
            script: "deno eval 'const url = \"https://api.test/v1/items\";
                     const got = await (await fetch(url)).json();
                     const body = \"x\".repeat(1e6);
                     const put = await (await fetch(url, { method: \"POST\", body })).json();
                     console.log(got.method, put.method, put.body.length)'",
            prints: "GET POST 1000000",
        },
        refused: Refused {
            what: "DELETE, which the rules do not have",
            script: "deno eval 'const r = await fetch(\"https://api.test/v1/items\", { method: \"DELETE\" });
                     throw new Error(await r.text())'",
            says: "policy_denied",
            log: &["DELETE", "api.test", "no rule"],
            never: "api.test DELETE",
        },
    },
    Client {
        name: "Bun",
        program: "bun",
        version: "echo Bun $(bun --version | head -n 1)",
        finds: Finds::Proxy("HTTPS_PROXY"),
        trusts: "NODE_EXTRA_CA_CERTS",
        works: Works {
            what: "GET, and POST of 1 MB",
            script: "bun -e 'const url = \"https://api.test/v1/items\";
                     const got = await (await fetch(url)).json();
                     const body = \"x\".repeat(1e6);
                     const put = await (await fetch(url, { method: \"POST\", body })).json();
                     console.log(got.method, put.method, put.body.length)'",
            prints: "GET POST 1000000",
        },
        refused: Refused {
            what: "DELETE, which the rules do not have",
            script: "bun -e 'const r = await fetch(\"https://api.test/v1/items\", { method: \"DELETE\" });
                     throw new Error(await r.text())'",
            says: "policy_denied",
            log: &["DELETE", "api.test", "no rule"],
            never: "api.test DELETE",
        },
    },
    Client {
        name: "Python requests",
        program: "python3",
        version: "python3 -c 'import requests as c; print(\"requests\", c.__version__)'",
        finds: Finds::Proxy("HTTPS_PROXY"),
        trusts: "REQUESTS_CA_BUNDLE",
        works: Works {
            what: "GET and POST in one session",
            script: "python3 -c 'import requests
s = requests.Session()
assert s.get(\"https://api.test/v1/hello\").json()[\"method\"] == \"GET\"
print(s.post(\"https://api.test/v1/items\", data=\"hello\").json()[\"body\"])'",
            prints: "hello",
        },
        refused: Refused {
            what: "DELETE, which the rules do not have",
            script: "python3 -c 'import requests
requests.delete(\"https://api.test/v1/items\").raise_for_status()'",
            says: "403 Client Error",
            log: &["DELETE", "api.test", "no rule"],
            never: "api.test DELETE",
        },
    },
    Client {
        name: "Python httpx",
        program: "python3",
        version: "python3 -c 'import httpx as c; print(\"httpx\", c.__version__)'",
        finds: Finds::Proxy("HTTPS_PROXY"),
        trusts: "SSL_CERT_FILE",
        works: Works {
            what: "GET and POST in one session",
            script: "python3 -c 'import httpx
with httpx.Client() as c:
    assert c.get(\"https://api.test/v1/hello\").json()[\"method\"] == \"GET\"
    print(c.post(\"https://api.test/v1/items\", content=\"hello\").json()[\"body\"])'",
            prints: "hello",
        },
        refused: Refused {
            what: "a host that the policy does not have",
            script: "python3 -c 'import httpx; httpx.get(\"https://elsewhere.test/\")'",
            says: "403 Forbidden",
            log: &["elsewhere.test:443", "no policy allows"],
            never: "elsewhere.test",
        },
    },
    Client {
        name: "Python aiohttp",
        program: "python3",
        version: "python3 -c 'import aiohttp as c; print(\"aiohttp\", c.__version__)'",
        finds: Finds::Nothing,
        trusts: "SSL_CERT_FILE",
        works: Works {
            what: "GET and POST in one session",
            script: "python3 -c 'import aiohttp, asyncio
async def main():
    async with aiohttp.ClientSession() as s:
        async with s.get(\"https://api.test/v1/hello\") as r:
            assert (await r.json())[\"method\"] == \"GET\"
        async with s.post(\"https://api.test/v1/items\", data=\"hello\") as r:
            print((await r.json())[\"body\"])
asyncio.run(main())'",
            prints: "hello",
        },
        refused: Refused {
            what: "a host that the policy does not have: its name does not exist",
            script: "python3 -c 'import aiohttp, asyncio
async def main():
    async with aiohttp.ClientSession() as s:
        await s.get(\"https://elsewhere.test/\")
asyncio.run(main())'",
            says: "Cannot connect to host elsewhere.test:443",
            log: &["DNS A elsewhere.test.", "no endpoint"],
            never: "elsewhere.test",
        },
    },
    Client {
        name: "AWS (boto3)",
        program: "python3",
        version: "python3 -c 'import boto3 as c; print(\"boto3\", c.__version__)'",
        finds: Finds::Proxy("HTTPS_PROXY"),
        trusts: "AWS_CA_BUNDLE",
        works: Works {
            what: "gets an object",
            script: concat!(s3!(), "import hashlib
print(hashlib.sha256(s3.get_object(Bucket=\"bucket\", Key=\"data.bin\")[\"Body\"].read()).hexdigest())'"),
            prints: data_digest!(),
        },
        refused: Refused {
            what: "putting one where only reading is allowed",
            script: concat!(s3!(), "s3.put_object(Bucket=\"bucket\", Key=\"own\", Body=b\"hello\")'"),
            says: "PutObject",
            log: &["PUT", "s3.test", "no rule"],
            never: "s3.test PUT",
        },
    },
    Client {
        name: "Java HttpClient",
        program: "java",
        version: "java -version 2>&1 | grep version | cut -d' ' -f1,3",
        finds: Finds::Nothing,
        trusts: "JAVA_TOOL_OPTIONS",
        works: Works {
            what: "POST",
            script: "java -cp /mnt/clients/java Fetch POST https://api.test/v1/items",
            prints: "{\"method\": \"POST\", \"path\": \"/v1/items\", \"body\": \"x\"}",
        },
        refused: Refused {
            what: "DELETE, which the rules do not have",
            script: "java -cp /mnt/clients/java Fetch DELETE https://api.test/v1/items",
            says: "policy_denied",
            log: &["DELETE", "api.test", "no rule"],
            never: "api.test DELETE",
        },
    },
    Client {
        name: "a static Go program",
        program: "/mnt/clients/go/fetch",
        version: "go version | cut -d' ' -f3",
        finds: Finds::Nothing,
        trusts: "SSL_CERT_FILE",
        works: Works {
            what: "GET; it knows nothing of proxies and has a resolver of its own",
            script: "/mnt/clients/go/fetch GET https://api.test/v1/hello",
            prints: "{\"method\": \"GET\", \"path\": \"/v1/hello\", \"body\": \"\"}",
        },
        refused: Refused {
            what: "DELETE, which the rules do not have",
            script: "/mnt/clients/go/fetch DELETE https://api.test/v1/hello",
            says: "policy_denied",
            log: &["DELETE", "api.test", "no rule"],
            never: "api.test DELETE",
        },
    },
    Client {
        name: "gRPC (Python, C core)",
        program: "python3",
        version: "python3 -c 'import grpc as c; print(\"grpcio\", c.__version__)'",
        finds: Finds::Proxy("grpc_proxy"),
        trusts: "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
        works: Works {
            what: "a call with trailers, and a stream of answers",
            script: "python3 -c 'import grpc
with grpc.secure_channel(\"grpc.test:443\", grpc.ssl_channel_credentials()) as c:
    reply, call = c.unary_unary(\"/demo.Greeter/Say\").with_call(b\"agent\", timeout=10)
    assert dict(call.trailing_metadata())[\"greeted\"] == \"yes\"
    count = list(c.unary_stream(\"/demo.Greeter/Count\")(b\"1000\", timeout=10))
    print(reply.decode(), len(count))'",
            prints: "hello, agent 1000",
        },
        refused: Refused {
            what: "a host that the policy does not have",
            script: "python3 -c 'import grpc
with grpc.secure_channel(\"elsewhere.test:443\", grpc.ssl_channel_credentials()) as c:
    c.unary_unary(\"/demo.Greeter/Say\")(b\"agent\", timeout=10)'",
            says: "details = ",
            log: &["elsewhere.test:443", "no policy allows"],
            never: "elsewhere.test",
        },
    },
    Client {
        name: "gRPC, each call judged",
        program: "python3",
        version: "python3 -c 'import grpc as c; print(\"grpcio\", c.__version__)'",
        finds: Finds::Proxy("grpc_proxy"),
        trusts: "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
        works: Works {
            what: "a call with trailers, and a stream of answers",
            script: "python3 -c 'import grpc
with grpc.secure_channel(\"judged.test:443\", grpc.ssl_channel_credentials()) as c:
    reply, call = c.unary_unary(\"/demo.Greeter/Say\").with_call(b\"agent\", timeout=10)
    assert dict(call.trailing_metadata())[\"greeted\"] == \"yes\"
    count = list(c.unary_stream(\"/demo.Greeter/Count\")(b\"1000\", timeout=10))
    print(reply.decode(), len(count))'",
            prints: "hello, agent 1000",
        },
        refused: Refused {
            what: "a method of the service that the rules do not have",
            script: "python3 -c 'import grpc
with grpc.secure_channel(\"judged.test:443\", grpc.ssl_channel_credentials()) as c:
    c.unary_unary(\"/demo.Greeter/Delete\")(b\"agent\", timeout=10)'",
            says: "details = ",
            log: &["POST", "/demo.Greeter/Delete", "no rule"],
            never: "gRPC Delete",
        },
    },
];
