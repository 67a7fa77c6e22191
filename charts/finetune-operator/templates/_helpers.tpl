{{- define "finetune.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "finetune.labels" -}}
app.kubernetes.io/name: finetune-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: finetune-operator
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end -}}

{{- define "finetune.selector" -}}
app.kubernetes.io/name: finetune-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "finetune.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "finetune.tlsSecret" -}}
{{- if eq .Values.certificates.source "Secret" -}}
{{ .Values.certificates.existingSecret }}
{{- else -}}
{{ include "finetune.name" . }}-tls
{{- end -}}
{{- end -}}

{{- /* The Secret of the webhook's unguessable paths. */ -}}
{{- define "finetune.pathsSecret" -}}
{{ include "finetune.name" . }}-webhook
{{- end -}}

{{- /* The names that the operator's servers are called by; the first is for people. */ -}}
{{- define "finetune.hosts" -}}
{{- $name := include "finetune.name" . -}}
{{- range $service := list "progress" "webhook" }}
- {{ $name }}-{{ $service }}.{{ $.Release.Namespace }}.svc
- {{ $name }}-{{ $service }}.{{ $.Release.Namespace }}.svc.cluster.local
{{- end }}
{{- end -}}

{{- /* Only the namespaces that this release watches, where it does not watch all. */ -}}
{{- define "finetune.namespaceSelector" -}}
{{- with .Values.watchNamespaces }}
namespaceSelector:
  matchExpressions:
    - {key: kubernetes.io/metadata.name, operator: In, values: {{ toJson . }}}
{{- end }}
{{- end -}}

{{- /* How Prometheus reads metrics over TLS: by the pod's address, with the certificate's name. */ -}}
{{- define "finetune.scrapeTls" -}}
scheme: https
tlsConfig:
  ca: {secret: {name: {{ include "finetune.tlsSecret" . }}, key: ca.crt}}
  serverName: {{ include "finetune.name" . }}-progress.{{ .Release.Namespace }}.svc
{{- end -}}
