# Ringfence decides by policy.yaml with an engine of its own. This file holds no rule and changes
# no decision. It is for places that insist on mounting a policy.rego: the supervisor recognises
# these exact bytes by their SHA-256 and refuses any other text.
package openshell.sandbox
