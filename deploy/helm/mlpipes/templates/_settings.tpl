{{- /* dagster.yaml: runs are pods, everything else is in Postgres and on the store. */ -}}
{{- define "mlpipes.dagsterSettings" -}}
storage:
  postgres:
    postgres_db:
      scheme: postgresql+psycopg2 # said explicitly: SQLAlchemy 2.1 means another driver by `postgresql`
      hostname: {{ include "mlpipes.postgresHost" . }}
      port: {{ int .Values.postgres.port }}
      username: {{ .Values.postgres.username }}
      password: { env: DAGSTER_PG_PASSWORD }
      db_name: {{ .Values.postgres.database }}
local_artifact_storage:
  module: dagster._core.storage.root
  class: LocalArtifactStorage
  config: { base_dir: {{ include "mlpipes.home" . }}/dagster }
compute_logs:
  module: dagster._core.storage.local_compute_log_manager
  class: LocalComputeLogManager
  config: { base_dir: {{ include "mlpipes.home" . }}/dagster/logs }
run_coordinator:
  module: dagster._core.run_coordinator
  class: QueuedRunCoordinator
  config: { dequeue_interval_seconds: 1, max_user_code_failure_retries: 5, user_code_failure_retry_delay: 10 }
run_launcher:
  module: mlpipes.orchestration.kubernetes_run_launcher
  class: PatientK8sRunLauncher
  config:
    job_namespace: {{ .Release.Namespace }}
    load_incluster_config: true
    service_account_name: {{ include "mlpipes.name" . }}-runs
    instance_config_map: {{ include "mlpipes.name" . }}-settings
    postgres_password_secret: {{ include "mlpipes.secret" . }}
    dagster_home: /etc/dagster
    job_image: {{ .Values.image }}
    image_pull_policy: {{ .Values.imagePullPolicy }}
    {{- with .Values.imagePullSecrets }}
    image_pull_secrets: {{ range . }}
      - name: {{ . }}{{ end }}
    {{- end }}
    env_secrets: {{ toJson .Values.environmentFrom }}
    labels:
      app.kubernetes.io/name: mlpipes
      app.kubernetes.io/instance: {{ .Release.Name }}
      mlpipes.io/part: run
    resources: {{ toJson .Values.dagster.runs.resources }}
    volumes: {{ include "mlpipes.codeVolumes" . | nindent 6 }}
    volume_mounts: {{ include "mlpipes.codeMounts" . | nindent 6 }}
    run_k8s_config:
      container_config:
        command: ["/usr/bin/env"] # a Job of dagster-k8s has arguments only, and an image's own entry point could be anything
        env: {{ include "mlpipes.environment" . | nindent 10 }}
        security_context: {{ include "mlpipes.security" . | nindent 10 }}
      pod_spec_config:
        {{- include "mlpipes.pod" . | nindent 8 }}
        terminationGracePeriodSeconds: 90 # a cancelled run waits for its training's last checkpoint, and ends the training
      job_spec_config: { ttl_seconds_after_finished: 3600 } # run monitoring lists them all, again and again
run_monitoring:
  enabled: true
  poll_interval_seconds: 10
  free_slots_after_run_end_seconds: 1
  start_timeout_seconds: 600
  cancel_timeout_seconds: 180
  max_resume_run_attempts: 0 # a resumed run would count steps as done that were not
run_retries:
  enabled: true
  max_retries: 3
  retry_on_asset_or_op_failure: false
concurrency:
  runs:
    max_concurrent_runs: {{ int .Values.dagster.maxConcurrentRuns }}
  pools:
    granularity: op
    default_limit: 1
telemetry: { enabled: false }
nux: { enabled: false }
{{- end }}

{{- /* What docs/kubernetes.md calls settings, with what the chart knows by itself. */ -}}
{{- define "mlpipes.trainingSettings" -}}
image: {{ .Values.image }}
image_pull_policy: {{ .Values.imagePullPolicy }}
image_pull_secrets: {{ toJson .Values.imagePullSecrets }}
namespace: {{ .Release.Namespace }}
owner: {{ include "mlpipes.name" . }}-settings
service_account: {{ include "mlpipes.name" . }}-training
run_as_user: {{ int .Values.user }}
fs_group: {{ int .Values.user }}
store:
  claim: {{ include "mlpipes.claim" . }}
  mount_path: {{ .Values.store.mountPath }}
  {{- with .Values.store.subPath }}
  sub_path: {{ . }}
  {{- end }}
{{- end }}

{{- define "mlpipes.settingsVolumes" -}}
- name: settings
  configMap: { name: {{ include "mlpipes.name" . }}-settings }
{{- end }}

{{- define "mlpipes.codeVolumes" -}}
{{ include "mlpipes.volumes" . }}
{{ include "mlpipes.settingsVolumes" . }}
{{- end }}

{{- define "mlpipes.codeMounts" -}}
{{ include "mlpipes.mounts" . }}
- { name: settings, mountPath: /etc/mlpipes }
{{- end }}

{{- define "mlpipes.dagsterEnvironment" -}}
- { name: DAGSTER_HOME, value: /etc/dagster }
{{- if not (hasKey .Values.environment "DAGSTER_GRPC_TIMEOUT_SECONDS") }}
# Instead of 60: the daemon asks one sensor after the other, and a code location on a node that hangs answers none.
- { name: DAGSTER_GRPC_TIMEOUT_SECONDS, value: "30" }
{{- end }}
{{ include "mlpipes.password" . }}
{{ include "mlpipes.environment" . }}
{{- end }}

{{- define "mlpipes.dagsterMounts" -}}
{{ include "mlpipes.codeMounts" . }}
- { name: settings, mountPath: /etc/dagster/dagster.yaml, subPath: dagster.yaml }
{{- end }}
