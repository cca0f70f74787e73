{{/* The files about registries, by name; nothing where there are none. */}}
{{- define "ringfence.registries" -}}
{{- with .Values.registries.images }}
images.yaml: {{ toJson . | quote }}
{{- end }}
{{- with .Values.registries.credentialProviders.config }}
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
{{- if .Values.registries.credentialProviders.config }}
- name: credential-providers
  mountPath: /etc/ringfence/credential-providers
  readOnly: true
{{- end }}
{{- if .Values.webhook.clientCa.configMap }}
- name: client-ca
  mountPath: /etc/ringfence/client-ca
  readOnly: true
{{- end }}
{{- end }}

{{/* Their volumes. */}}
{{- define "ringfence.volumes" -}}
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
{{- if .Values.registries.credentialProviders.config }}
{{- if not .Values.registries.credentialProviders.volume }}
{{- fail "registries.credentialProviders.volume: with registries.credentialProviders.config the source of a volume is needed that holds the plugins' programs" }}
{{- end }}
- name: credential-providers
  {{- toYaml .Values.registries.credentialProviders.volume | nindent 2 }}
{{- end }}
{{- if .Values.webhook.clientCa.configMap }}
- name: client-ca
  configMap:
    name: {{ .Values.webhook.clientCa.configMap }}
{{- end }}
{{- end }}
