//! What the proxy knows at first.

/// What the proxy begins with.
pub const POLICY: &str = r#"
version: 1
network_policies:
  api:
    endpoints:
      - host: api.test
        port: 443
        protocol: rest
        enforcement: enforce
        rules:
          - allow: { method: GET, path: "/ok/**" }
          - allow: { method: POST, path: "/post" }
          - allow: { method: GET, path: "/search", query: { q: "cats" } }
      - { host: api.test, port: 80, protocol: rest, enforcement: enforce, access: read-only }
      - { host: api.test, ports: [80, 443], path: /graphql, protocol: graphql, enforcement: enforce, access: read-only }
      - { host: audited.test, port: 443, path: /graphql, protocol: graphql, enforcement: audit, access: read-only }
      - host: api.test
        port: 443
        path: /mcp
        protocol: mcp
        enforcement: enforce
        rules: [{ allow: { method: initialize } }, { allow: { method: tools/call, tool: search } }]
      - { host: api.test, port: 80, path: /rpc, protocol: json-rpc, enforcement: enforce, rules: [{ allow: { method: reports.list } }] }
      - { host: slow.test, port: 9090, path: /graphql, protocol: graphql, enforcement: enforce, access: read-only, graphql_max_body_bytes: 8388608 }
      - { host: rpc.test, port: 4433, path: /graphql, protocol: graphql, enforcement: enforce, access: read-only }
      - host: rpc.test
        ports: [4433, 8081]
        protocol: rest
        enforcement: enforce
        rules:
          - allow: { method: POST, path: "/echo.Echo/*" }
          - allow: { method: GET, path: "/ok/**" }
      - { host: audited.test, port: 443, protocol: rest, enforcement: audit, access: read-only }
    binaries: [{ path: /usr/bin/curl }]
  sockets:
    endpoints:
      - host: ws.test
        ports: [8080, 8082, 8443]
        protocol: websocket
        enforcement: enforce
        rules:
          - allow: { method: GET, path: "**" }
          - allow: { method: WEBSOCKET_TEXT, path: "/echo/**" }
          - allow: { method: WEBSOCKET_BINARY, path: /echo/binary }
        deny_rules: [{ method: GET, path: /denied }]
      - host: ws.test
        ports: [8080, 8443]
        path: /graphql
        protocol: websocket
        enforcement: enforce
        rules:
          - allow: { method: GET, path: /graphql }
          - allow: { operation_type: subscription, fields: [ticks] }
      - { host: auditws.test, port: 8080, protocol: websocket, enforcement: audit, access: read-only }
      - { host: star.test, port: 8080, protocol: rest, enforcement: enforce, access: full }
      - { host: rest.test, port: 8080, protocol: rest, enforcement: enforce, access: read-write }
    binaries: [{ path: /usr/bin/curl }]
  whole:
    endpoints:
      - { host: raw.test, ports: [80, 443, 2525, 4433, 8081] }
      - { host: skip.test, port: 443, tls: skip }
      - { host: expired.test, port: 4434 }
      - { host: nowhere.test, port: 443 }
      - { host: closed.test, port: 9 }
      - { host: meta.test, port: 80 }
      - { host: mixed.test, port: 80 }
      - { host: "*.wild.test", port: 443 }
      - { host: 127.0.0.1, port: 8090 }
      - { host: pod.ringfence.internal, ports: [80, 7001, 15200] }
      - { port: 15200, allowed_ips: ["10.88.0.1/32"] }
      - { host: own.test, port: 80 }
      - { host: kubernetes.default.svc, port: 443 }
      - { host: kubernetes.default.evil.test, port: 443 }
      - { host: cluster.test, port: 443, allowed_ips: ["10.96.0.0/28"] }
      - { host: meant.test, port: 443, allowed_ips: ["10.96.0.0/29"] }
      - { host: db.prod, port: 80 }
      - { host: short, port: 80 }
      - { host: broken.test, port: 80 }
      - { host: 10.77.0.1, port: 80, allowed_ips: ["10.0.0.0/8"] }
      - { host: 10.77.0.1, port: 2525 }
      - { host: "*.ringfence.internal", port: 81 }
      - { host: pod.ringfence.internal, port: 82, allowed_ips: ["10.99.0.0/16"] }
      - { host: pod.ringfence.internal, port: 83, allowed_ips: ["10.88.0.0/16"] }
      - { port: 84, allowed_ips: ["10.99.0.0/16"] }
      - { host: "*.ringfence.internal", port: 85, allowed_ips: ["10.88.0.1/32"] }
      - { host: "2001:db8:77::1", ports: [80, 443] }
      - { host: "*.wild6.test", port: 80, allowed_ips: ["2001:db8:77::/48"] }
      - { port: 86, allowed_ips: ["2001:db8:77::/48"] }
      - { host: db.test, port: 3306, protocol: sql, access: full, enforcement: audit }
    binaries: [{ path: /usr/bin/curl }]
"#;

/// Its hosts file.
pub const HOSTS: &str = "\
10.77.0.1 ws.test auditws.test star.test rest.test
10.77.0.1 db.test slow.test
10.77.0.1 api.test raw.test skip.test audited.test expired.test closed.test one.wild.test rpc.test
169.254.169.254 meta.test
10.77.0.1 mixed.test
127.0.0.1 mixed.test
10.88.0.1 own.test
";
