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

{{- /* Only the namespaces that this release serves. */ -}}
{{- define "finetune.namespaceSelector" -}}
{{- if .Values.watchNamespaces }}
namespaceSelector:
  matchExpressions:
    - {key: kubernetes.io/metadata.name, operator: In, values: {{ toJson .Values.watchNamespaces }}}
{{- else }}
namespaceSelector:
  matchExpressions:
    - {key: kubernetes.io/metadata.name, operator: NotIn, values: {{ include "finetune.excluded" . }}}
{{- end }}
{{- end -}}

{{- /* Namespaces in which there are no jobs, as JSON: the system's, and the operator's own unless it is named. */ -}}
{{- define "finetune.excluded" -}}
{{- range .Values.excludeNamespaces }}
{{- if has . $.Values.watchNamespaces }}
{{- fail (printf "watchNamespaces and excludeNamespaces: found %s in both; a namespace is in one of them" .) }}
{{- end }}
{{- end }}
{{- $own := ternary (list) (list .Release.Namespace) (has .Release.Namespace .Values.watchNamespaces) }}
{{- concat .Values.excludeNamespaces $own | uniq | toJson }}
{{- end -}}

{{- /* The operator's name for the API server. */ -}}
{{- define "finetune.account" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "finetune.name" . }}
{{- end -}}

{{- /* Not empty where there are policies. */ -}}
{{- define "finetune.policies" -}}
{{- if and .Values.admission.policies.enabled (semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version) }}true{{ end -}}
{{- end -}}

{{- /* The binding of one policy: its release's context, the policy's name, and "everywhere" where it holds in every namespace. */ -}}
{{- define "finetune.policyBinding" -}}
{{- $root := index . 0 }}
{{- $name := printf "%s-%s" (include "finetune.name" $root) (index . 1) }}
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata:
  name: {{ $name }}
  labels: {{- include "finetune.labels" $root | nindent 4 }}
spec:
  policyName: {{ $name }}
  validationActions: [Deny]
  {{- if eq (len .) 2 }}
  matchResources: {{- include "finetune.namespaceSelector" $root | nindent 4 }}
  {{- end }}
{{- end -}}

{{- /* How Prometheus reads metrics over TLS: by the pod's address, with the certificate's name. */ -}}
{{- define "finetune.scrapeTls" -}}
scheme: https
tlsConfig:
  ca: {secret: {name: {{ include "finetune.tlsSecret" . }}, key: ca.crt}}
  serverName: {{ include "finetune.name" . }}-progress.{{ .Release.Namespace }}.svc
{{- end -}}
