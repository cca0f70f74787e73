{{/*
The CA bundle of a webhook entry. With a CA of the webhook's own there is none here: the webhook owns
that field and applies it itself. With a certificate from elsewhere it is the value, or cainjector's.
*/}}
{{- define "ringfence.caBundle" -}}
{{- include "ringfence.checkCertificates" . -}}
{{- if .Values.certificates.caBundle -}}
{{- printf "\n      caBundle: %s" (b64enc .Values.certificates.caBundle) -}}
{{- end -}}
{{- end -}}

{{- define "ringfence.webhookAnnotations" -}}
{{- $annotations := deepCopy (.Values.webhook.annotations | default dict) -}}
{{- with .Values.certificates.injectCaFrom -}}
{{- $_ := set $annotations "cert-manager.io/inject-ca-from" (printf "%s/%s" $.Release.Namespace .) -}}
{{- end -}}
{{- with $annotations }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{- define "ringfence.checkCertificates" -}}
{{- with .Values.certificates -}}
{{- /* Not in the schema: helm would print the value, and this one may be a key by mistake. */ -}}
{{- if contains "PRIVATE KEY" .caBundle -}}
{{- fail "certificates.caBundle holds a private key; it is for the CA's certificate (PEM), which everybody may read" -}}
{{- else if and .caBundle (not (contains "-----BEGIN CERTIFICATE-----" .caBundle)) -}}
{{- fail "certificates.caBundle is not PEM: give it the text of the CA's certificate, by --set-file certificates.caBundle=ca.crt" -}}
{{- end -}}
{{- if and .secret .caBundle .injectCaFrom -}}
{{- fail "certificates.caBundle and certificates.injectCaFrom exclude each other: the first is written by this chart, the other by cert-manager's cainjector" -}}
{{- else if and .secret (not .caBundle) (not .injectCaFrom) -}}
{{- fail "certificates.secret needs certificates.caBundle (PEM of the CA that issued it) or certificates.injectCaFrom (a cert-manager Certificate): else no API server trusts what is served" -}}
{{- else if and (not .secret) (or .caBundle .injectCaFrom) -}}
{{- fail "certificates.caBundle and certificates.injectCaFrom need certificates.secret, the Secret with the serving certificate; without it the webhook has a CA of its own and writes caBundle itself" -}}
{{- end -}}
{{- end -}}
{{- end -}}
