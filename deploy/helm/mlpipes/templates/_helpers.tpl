{{- define "mlpipes.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "mlpipes.labels" -}}
app.kubernetes.io/name: mlpipes
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- /* Of one part: (list $ "webserver") */ -}}
{{- define "mlpipes.selector" -}}
app.kubernetes.io/name: mlpipes
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
mlpipes.io/part: {{ index . 1 }}
{{- end }}

{{- define "mlpipes.match" -}}
{ matchLabels: {{ include "mlpipes.selector" . | fromYaml | toJson }} }
{{- end }}

{{- define "mlpipes.metadata" -}}
{{- $root := index . 0 }}{{ $part := index . 1 -}}
name: {{ include "mlpipes.name" $root }}-{{ $part }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "mlpipes.labels" $root | nindent 2 }}
  mlpipes.io/part: {{ $part }}
{{- end }}

{{- define "mlpipes.home" -}}
{{ .Values.store.mountPath }}/mlpipes
{{- end }}

{{- define "mlpipes.claim" -}}
{{ .Values.store.claim | default (printf "%s-store" (include "mlpipes.name" .)) }}
{{- end }}

{{- define "mlpipes.secret" -}}
{{ .Values.postgres.secret | default (printf "%s-postgres" (include "mlpipes.name" .)) }}
{{- end }}

{{- define "mlpipes.postgresHost" -}}
{{- if .Values.postgres.enabled }}{{ include "mlpipes.name" . }}-postgres{{ else }}{{ required "postgres.host: name the server, or set postgres.enabled" .Values.postgres.host }}{{ end }}
{{- end }}

{{- define "mlpipes.serveSecret" -}}
{{ .Values.serve.secret | default (printf "%s-serve" (include "mlpipes.name" .)) }}
{{- end }}

{{- /* The part that serves a workload: names in Kubernetes have neither capitals nor underscores. */ -}}
{{- define "mlpipes.servePart" -}}
serve-{{ . | lower | replace "_" "-" | trimSuffix "-" }}
{{- end }}

{{- define "mlpipes.mlflow" -}}
{{- if .Values.mlflow.enabled }}http://{{ include "mlpipes.name" . }}-mlflow:5000{{ else }}{{ required "mlflow.uri: name the server, or set mlflow.enabled" .Values.mlflow.uri }}{{ end }}
{{- end }}

{{- /* Nothing runs as root, gains rights, or writes anywhere but in the store and in /tmp. */ -}}
{{- define "mlpipes.security" -}}
runAsNonRoot: true
runAsUser: {{ int .Values.user }}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "mlpipes.volumes" -}}
- name: tmp
  emptyDir: {}
- name: store
  persistentVolumeClaim: { claimName: {{ include "mlpipes.claim" . }} }
{{- with .Values.volumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "mlpipes.mounts" -}}
- { name: tmp, mountPath: /tmp }
- name: store
  mountPath: {{ .Values.store.mountPath }}
  {{- with .Values.store.subPath }}
  subPath: {{ . }}
  {{- end }}
{{- with .Values.mounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* What the code location and runs are told. */ -}}
{{- define "mlpipes.environment" -}}
- { name: MLPIPES_KUBERNETES, value: /etc/mlpipes/kubernetes.yaml }
{{ include "mlpipes.serveEnvironment" . }}
{{- end }}

{{- define "mlpipes.serveEnvironment" -}}
- { name: MLPIPES_HOME, value: {{ include "mlpipes.home" . | quote }} }
- { name: MLFLOW_TRACKING_URI, value: {{ include "mlpipes.mlflow" . | quote }} }
{{ include "mlpipes.ownEnvironment" . }}
{{- end }}

{{- define "mlpipes.ownEnvironment" -}}
{{- if not (hasKey .Values.environment "HOME") }}
- { name: HOME, value: /tmp }
{{- end }}
{{- range $name, $value := .Values.environment }}
- name: {{ $name | quote }}
{{- if kindIs "map" $value }}
  valueFrom: { secretKeyRef: { name: {{ $value.secret | quote }}, key: {{ $value.key | quote }} } }
{{- else if and (kindIs "float64" $value) (eq (floor $value) $value) }}
  value: {{ $value | int64 | toString | quote }}
{{- else }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- define "mlpipes.password" -}}
- name: DAGSTER_PG_PASSWORD
  valueFrom: { secretKeyRef: { name: {{ include "mlpipes.secret" . }}, key: postgresql-password } }
{{- end }}

{{- /* Where MLflow's tables are, for a container with their password in PGPASSWORD, which any characters may be in. */ -}}
{{- define "mlpipes.mlflowStore" -}}
postgresql+psycopg2://{{ .Values.postgres.username }}@{{ include "mlpipes.postgresHost" . }}:{{ int .Values.postgres.port }}/{{ .Values.postgres.mlflowDatabase }}
{{- end }}

{{- define "mlpipes.mlflowEnvironment" -}}
- name: PGPASSWORD
  valueFrom: { secretKeyRef: { name: {{ include "mlpipes.secret" . }}, key: postgresql-password } }
{{ include "mlpipes.ownEnvironment" . }}
- { name: MLFLOW_SERVER_ENABLE_JOB_EXECUTION, value: "false" } # eight processes more, for what nobody here does
- { name: MLFLOW_BACKEND_STORE_URI, value: {{ include "mlpipes.mlflowStore" . | quote }} }
{{- end }}

{{- /* A command that changes tables for newer programs. Those of a database that is newer still, as after a rollback, stay. */ -}}
{{- define "mlpipes.migration" -}}
{{- $script := "\"$@\" || echo 'The tables were left as they are; see above.'" -}}
{{ include "mlpipes.whenDatabaseAnswers" (list (index . 0) (concat (list "sh" "-c" $script "migrate") (index . 1))) }}
{{- end }}

{{- /* What all pods of the chart have in common. */ -}}
{{- define "mlpipes.pod" -}}
{{ include "mlpipes.placedPod" (list . .Values.nodeSelector .Values.tolerations) }}
{{- end }}

{{- /* The same on nodes of one's own: (list $ nodeSelector tolerations) */ -}}
{{- define "mlpipes.placedPod" -}}
{{- $root := index . 0 -}}
enableServiceLinks: false
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
securityContext: { runAsNonRoot: true, runAsUser: {{ int $root.Values.user }}, fsGroup: {{ int $root.Values.user }}, fsGroupChangePolicy: OnRootMismatch, seccompProfile: { type: RuntimeDefault } }
{{- with index . 1 }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
tolerations: # a dead node's pods come up elsewhere at once, not in five minutes
  - { key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute, tolerationSeconds: 10 }
  - { key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 10 }
{{- with index . 2 }}
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* A command that begins when the database answers: what crashes instead is started after ever longer times. */ -}}
{{- define "mlpipes.whenDatabaseAnswers" -}}
{{- $root := index . 0 -}}
{{- $script := "until python -c 'import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)' \"$0\" \"$1\" 2>/dev/null; do sleep 1; done; shift; exec \"$@\"" -}}
{{ concat (list "sh" "-c" $script (include "mlpipes.postgresHost" $root) ($root.Values.postgres.port | toString)) (index . 1) | toJson }}
{{- end }}

{{- define "mlpipes.container" -}}
image: {{ required "image: name the image with this package; `make images` builds one" .Values.image }}
imagePullPolicy: {{ .Values.imagePullPolicy }}
securityContext: {{ include "mlpipes.security" . | nindent 2 }}
{{- end }}

{{- /* A start may take ten minutes on a busy node: nothing that starts is killed for being slow. */ -}}
{{- define "mlpipes.probes" -}}
{{ include "mlpipes.readyProbes" . }}
{{ include "mlpipes.liveProbe" . }}
{{- end }}

{{- define "mlpipes.readyProbes" -}}
startupProbe: { {{ . }}, periodSeconds: 3, timeoutSeconds: 5, failureThreshold: 200 }
readinessProbe: { {{ . }}, periodSeconds: 5, timeoutSeconds: 5, failureThreshold: 6 }
{{- end }}

{{- define "mlpipes.liveProbe" -}}
livenessProbe: { {{ . }}, periodSeconds: 30, timeoutSeconds: 20, failureThreshold: 4 }
{{- end }}
