{{/* The same in values that an upgrade took over from a chart without them. */}}
{{- define "ringfence.providers" -}}
{{- toJson (.Values.registries.credentialProviders | default dict) }}
{{- end }}
{{- define "ringfence.clientCa" -}}
{{- toJson (.Values.webhook.clientCa | default dict) }}
{{- end }}

{{/* The files about registries, by name; nothing where there are none. */}}
{{- define "ringfence.registries" -}}
{{- with .Values.registries.images }}
images.yaml: {{ toJson . | quote }}
{{- end }}
{{- with (include "ringfence.providers" . | fromJson).config }}
credential-providers.yaml: {{ toJson . | quote }}
{{- end }}
{{- end }}

{{/* Where the webhook finds its files. */}}
{{- define "ringfence.mounts" -}}
{{- if .Values.registries.ca.configMap }}
- name: registry-ca
  mountPath: /etc/ringfence/registry-ca
  readOnly: true
{{- end }}
{{- if include "ringfence.registries" . }}
- name: registries
  mountPath: /etc/ringfence/registries
  readOnly: true
{{- end }}
{{- if (include "ringfence.providers" . | fromJson).config }}
- name: credential-providers
  mountPath: /etc/ringfence/credential-providers
  readOnly: true
{{- end }}
{{- if (include "ringfence.clientCa" . | fromJson).configMap }}
- name: client-ca
  mountPath: /etc/ringfence/client-ca
  readOnly: true
{{- end }}
{{- end }}

{{/* Half of a setting would be none, and nobody told. */}}
{{- define "ringfence.halves" -}}
{{- $providers := include "ringfence.providers" . | fromJson }}
{{- if and $providers.volume (not $providers.config) }}
{{- fail "registries.credentialProviders.config: with registries.credentialProviders.volume the kubelet's CredentialProviderConfig is needed that says what the plugins are for" }}
{{- end }}
{{- $clientCa := include "ringfence.clientCa" . | fromJson }}
{{- if and $clientCa.names (not $clientCa.configMap) }}
{{- fail "webhook.clientCa.configMap: with webhook.clientCa.names the ConfigMap with the CA is needed; without it anybody is answered" }}
{{- end }}
{{- if and $clientCa.configMap (not $clientCa.names) }}
{{- fail "webhook.clientCa.names: name what the API servers' certificate is for; without a name every certificate of that CA would do" }}
{{- end }}
{{- end }}

{{/* Their volumes. */}}
{{- define "ringfence.volumes" -}}
{{- include "ringfence.halves" . }}
{{- if .Values.registries.ca.configMap }}
- name: registry-ca
  configMap:
    name: {{ .Values.registries.ca.configMap }}
{{- end }}
{{- if include "ringfence.registries" . }}
- name: registries
  configMap:
    name: {{ include "ringfence.fullname" . }}-registries
{{- end }}
{{- if (include "ringfence.providers" . | fromJson).config }}
{{- if not (include "ringfence.providers" . | fromJson).volume }}
{{- fail "registries.credentialProviders.volume: with registries.credentialProviders.config the source of a volume is needed that holds the plugins' programs" }}
{{- end }}
- name: credential-providers
  {{- toYaml .Values.registries.credentialProviders.volume | nindent 2 }}
{{- end }}
{{- if (include "ringfence.clientCa" . | fromJson).configMap }}
- name: client-ca
  configMap:
    name: {{ .Values.webhook.clientCa.configMap }}
{{- end }}
{{- end }}
