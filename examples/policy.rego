# What Ringfence's own engine decides, as Rego: the rules of both of OpenShell's contracts over a
# policy.yaml with `protocol: rest`, `graphql` or none.
#
# Ringfence recognises these exact bytes and decides by its own engine, which does the same and is a
# hundred times faster; a property test keeps the two alike. Change a byte and regorus runs the text:
# start from here for rules of your own. docs/policy.md has the contract.
package openshell.sandbox

import rego.v1

# What is not about the network comes from policy.yaml as it is.

filesystem_policy := data.filesystem_policy

landlock_policy := data.landlock

process_policy := data.process

# --- Who asks -------------------------------------------------------------------------------------

# The executable itself. What runs below it counts only where its entry says so: any program can
# become a child of any other.
admits(policy) if {
	some binary in policy.binaries
	is_path(binary.path, input.exec.path)
	has_content(binary)
	runs_own_code(binary)
}

admits(policy) if {
	some binary in policy.binaries
	binary.ancestors == true
	some ancestor in input.exec.ancestors
	is_path(binary.path, ancestor)
}

# An entry for everyone needs no path to be known, unless it asks for more.
admits(policy) if {
	some binary in policy.binaries
	binary.path in {"**", "/**"}
	not binary.sha256
	object.get(binary, "tainted", "report") != "refuse"
}

is_path("**", _) := true

is_path(pattern, path) if {
	not contains(pattern, "*")
	pattern == path
}

is_path(pattern, path) if {
	contains(pattern, "*")
	glob.match(pattern, ["/"], path)
}

has_content(binary) if not binary.sha256

has_content(binary) if trim_prefix(lower(binary.sha256), "sha256:") == input.exec.sha256

runs_own_code(binary) if object.get(binary, "tainted", "report") != "refuse"

runs_own_code(_) if not input.exec.tainted

# --- Where to -------------------------------------------------------------------------------------

# Every endpoint for this host and port, of every policy that is for the caller.
matches := [{"policy": key, "endpoint": endpoint} |
	some key, policy in data.network_policies
	some endpoint in policy.endpoints
	input.network.port in endpoint.ports
	is_host(object.get(endpoint, "host", ""))
	admits(policy)
]

# An endpoint without a host is for every name; its allowed_ips are the limit.
is_host("") := true

is_host(pattern) if pattern == input.network.host

is_host(pattern) if {
	contains(pattern, "*")
	glob.match(pattern, ["."], input.network.host)
}

inspected := [match | some match in matches; match.endpoint.protocol]

smallest(some_matches) := min({match.policy | some match in some_matches})

# --- A connection: the contract up to OpenShell 0.0.110 -------------------------------------------

default network_action := "deny"

network_action := "allow" if count(matches) > 0

matched_network_policy := smallest(matches) if count(matches) > 0

default deny_reason := ""

deny_reason := "no policy allows this host and port for this binary" if count(matches) == 0

# Endpoints with something to obey. Inspected ones come first: OpenShell takes the first for the one
# that counts.
_matching_endpoint_configs := array.concat(
	[match.endpoint | some match in inspected],
	[match.endpoint |
		some match in matches
		not match.endpoint.protocol
		is_extended(match.endpoint)
	],
)

is_extended(endpoint) if endpoint.allowed_ips

is_extended(endpoint) if endpoint.tls

default exact_declared_endpoint_host := false

exact_declared_endpoint_host if {
	some match in matches
	match.endpoint.host == input.network.host
}

# --- A connection: the contract from OpenShell 0.0.111 on -----------------------------------------

egress_authorization := {
	"action": network_action,
	"matched_policy": object.get(named_policy, "key", ""),
	"deny_reason": deny_reason,
	"endpoint_configs": _matching_endpoint_configs,
	"matched_endpoints": [object.union(match.endpoint, {"policy": match.policy}) |
		some match in matches
	],
	"exact_declared_endpoint_host": exact_declared_endpoint_host,
}

default named_policy := {}

named_policy := {"key": matched_network_policy}

# --- A request ------------------------------------------------------------------------------------

# Inspected endpoints that speak for the path.
covering := [match | some match in inspected; speaks_for(match.endpoint)]

# Where content is read, endpoints that do not read it have nothing to say.
reading := [match | some match in covering; match.endpoint.protocol == "graphql"]

speaking := reading if count(reading) > 0

speaking := covering if count(reading) == 0

allowing := [match |
	some match in speaking
	takes_slash(match.endpoint)
	allows(match.endpoint)
]

# A denial reaches a little further: `*` in an endpoint's path crosses `/` for it.
denying := [match |
	some match in inspected
	may_speak_for(match.endpoint)
	denies(match.endpoint)
]

allows(endpoint) if {
	endpoint.protocol != "graphql"
	some rule in endpoint.rules
	is_request(rule.allow)
	has_query(rule.allow)
}

allows(endpoint) if {
	endpoint.protocol == "graphql"
	every operation in input.request.graphql.operations {
		allows_operation(endpoint, operation)
	}
}

denies(endpoint) if {
	endpoint.protocol != "graphql"
	some rule in endpoint.deny_rules
	is_request(rule)
	has_in_query(rule)
}

denies(endpoint) if {
	endpoint.protocol == "graphql"
	some operation in input.request.graphql.operations
	asked := what(endpoint, operation)
	some rule in endpoint.deny_rules
	is_type(rule, asked.type)
	is_name(rule, asked.name)
	has_denied_field(rule, asked)
}

enforced(some_matches) := [match |
	some match in some_matches
	match.endpoint.enforcement == "enforce"
]

says(action, some_matches, reason) := {
	"action": action,
	"matched_policy": smallest(some_matches),
	"deny_reason": reason,
}

# Ringfence's own rule beside the contract: with one answer it knows what `audit` lets pass.
default request_authorization := {"action": "deny", "deny_reason": "no policy is for this caller"}

request_authorization := says("deny", enforced(denying), denied) if {
	count(enforced(denying)) > 0
} else := says("allow", matches, "") if {
	count(matches) > 0
	count(inspected) == 0
} else := says("audit", denying, denied) if {
	count(allowing) > 0
	count(denying) > 0
} else := says("allow", allowing, "") if {
	count(allowing) > 0
} else := says("deny", inspected, slash) if {
	some match in covering
	not takes_slash(match.endpoint)
} else := says("deny", enforced(speaking), unlisted) if {
	count(enforced(speaking)) > 0
} else := says("audit", speaking, unlisted) if {
	count(speaking) > 0
} else := says("deny", inspected, uncovered) if {
	count(inspected) > 0
}

denied := "a deny rule refuses this request"

slash := "the endpoint does not allow an encoded slash (%2F) in paths"

unlisted := "no rule allows this request"

uncovered := "no endpoint of the policy covers this path"

default allow_request := false

allow_request if request_authorization.action == "allow"

default request_deny_reason := ""

request_deny_reason := request_authorization.deny_reason

# --- What a rule fits -----------------------------------------------------------------------------

is_request(rule) if {
	is_method(rule.method)
	is_request_path(rule.path)
}

is_method("*") := true

is_method(method) if upper(method) == upper(input.request.method)

is_method(method) if {
	upper(method) == "GET"
	upper(input.request.method) == "HEAD"
}

is_request_path("**") := true

is_request_path(pattern) if pattern == input.request.path

is_request_path(pattern) if {
	not is_plain(pattern)
	glob.match(pattern, ["/"], input.request.path)
}

is_plain(pattern) if {
	every special in ["*", "?", "[", "{", "}", "\\"] {
		not contains(pattern, special)
	}
}

takes_slash(_) if not contains(input.request.path, "%2F")

takes_slash(endpoint) if endpoint.allow_encoded_slash == true

# An endpoint's path: absent, exact, everything below, or a pattern.
speaks_for(endpoint) if object.get(endpoint, "path", "") in {"", "**", "/**"}

speaks_for(endpoint) if endpoint.path == input.request.path

speaks_for(endpoint) if {
	is_below(endpoint.path)
	prefix := trim_suffix(endpoint.path, "/**")
	input.request.path == prefix
}

speaks_for(endpoint) if {
	not is_plain(endpoint.path)
	endpoint.path != "**"
	glob.match(endpoint.path, ["/"], input.request.path)
}

is_below(pattern) if {
	endswith(pattern, "/**")
	is_plain(trim_suffix(pattern, "/**"))
}

may_speak_for(endpoint) if speaks_for(endpoint)

may_speak_for(endpoint) if {
	not is_plain(endpoint.path)
	not is_below(endpoint.path)
	glob.match(endpoint.path, null, input.request.path)
}

# An allow rule: every key is there, and each of its values fits.
has_query(rule) if {
	every key, matcher in object.get(rule, "query", {}) {
		values := input.request.query_params[key]
		every value in values {
			is_value(matcher, value)
		}
	}
}

# A deny rule: of every key one value fits.
has_in_query(rule) if {
	every key, matcher in object.get(rule, "query", {}) {
		some value in input.request.query_params[key]
		is_value(matcher, value)
	}
}

is_value(matcher, value) if {
	some pattern in patterns(matcher)
	is_text(pattern, value)
}

patterns(matcher) := [matcher] if is_string(matcher)

patterns(matcher) := [matcher.glob] if matcher.glob

patterns(matcher) := matcher.any if matcher.any

is_text("**", _) := true

is_text(pattern, value) if pattern == value

is_text(pattern, value) if {
	not is_plain(pattern)
	glob.match(pattern, [], value)
}

# --- An operation of GraphQL ----------------------------------------------------------------------

# What it does: as its document says, else as the policy's register of persisted queries says.
what(_, operation) := {
	"type": operation.operation_type,
	"name": operation.operation_name,
	"fields": operation.fields,
} if {
	operation.operation_type != ""
}

what(endpoint, operation) := object.union(entry, {
	"type": lower(object.get(entry, "operation_type", "*")),
	"name": object.get(entry, "operation_name", ""),
}) if {
	operation.operation_type == ""
	endpoint.persisted_queries == "allow_registered"
	entry := endpoint.graphql_persisted_queries[persisted(operation)]
}

persisted(operation) := operation.persisted_query_hash

persisted(operation) := operation.persisted_query_id

allows_operation(endpoint, operation) if {
	asked := what(endpoint, operation)
	some rule in endpoint.rules
	lower(rule.allow.operation_type) in {"*", asked.type}
	is_name(rule.allow, asked.name)
	has_allowed_fields(rule.allow, asked)
}

# A registered query of any type may be the one that is denied.
is_type(rule, type) if lower(rule.operation_type) in {"*", type}

is_type(_, "*") := true

is_name(rule, _) if object.get(rule, "operation_name", "") == ""

is_name(rule, name) if is_text(rule.operation_name, name)

# To allow, every root field must be listed; to deny, one is enough, and so is not to know.
has_allowed_fields(rule, _) if count(object.get(rule, "fields", [])) == 0

has_allowed_fields(rule, asked) if {
	count(asked.fields) > 0
	every field in asked.fields {
		is_listed(rule, field)
	}
}

has_denied_field(rule, _) if count(object.get(rule, "fields", [])) == 0

has_denied_field(_, asked) if not asked.fields

has_denied_field(rule, asked) if {
	some field in asked.fields
	is_listed(rule, field)
}

is_listed(rule, field) if {
	some pattern in rule.fields
	is_text(pattern, field)
}
