{{- define "sparsify.name" -}}
{{- if contains "sparsify" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-sparsify" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "sparsify.selector" -}}
app.kubernetes.io/name: sparsify
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "sparsify.labels" -}}
{{ include "sparsify.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "sparsify.image" -}}
{{- if .Values.image.digest }}{{ .Values.image.repository }}@{{ .Values.image.digest }}{{ else }}{{ .Values.image.repository }}:{{ .Values.image.tag }}{{ end }}
{{- end }}

{{- /* Annotations of what holds pods. A tag is right where the registry, and so the digest, is known only to who installs. */}}
{{- define "sparsify.skips" -}}
{{- if not .Values.image.digest }}
  annotations:
    checkov.io/skip1: CKV_K8S_43=the digest is that of the registry to which the image was pushed, set image.digest
{{- end }}
{{- end }}

{{- define "sparsify.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "sparsify.security" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end }}

{{- /* All that is written at run time; the kernels of the image are elsewhere, and nothing hides them. */}}
{{- define "sparsify.writableMounts" -}}
- { name: tmp, mountPath: /tmp }
- { name: cache, mountPath: /home/sparsify/.cache }
- { name: shared-memory, mountPath: /dev/shm }
{{- end }}

{{- define "sparsify.hubEnvironment" -}}
- { name: HF_HUB_OFFLINE, value: "0" }
{{- with . }}
- { name: HF_TOKEN_PATH, value: /etc/sparsify/hub/token }
{{- end }}
{{- end }}
