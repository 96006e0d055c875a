{{- define "seedwire.fullname" -}}
{{- $name := ternary .Release.Name (printf "%s-seedwire" .Release.Name) (contains "seedwire" .Release.Name) -}}
{{- $name | trunc 36 | trimSuffix "-" -}}
{{- end }}

{{- define "seedwire.selector" -}}
app.kubernetes.io/name: seedwire
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "seedwire.labels" -}}
{{ include "seedwire.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "seedwire.image" -}}
{{ .root.Values.image.registry }}/{{ .component }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "seedwire.broker" -}}
{{- if .Values.nats.enabled -}}
{{ ternary "tls" "nats" (ne .Values.identity.secret "") }}://{{ include "seedwire.fullname" . }}-nats:4222
{{- else -}}
{{ required "nats.url: where the broker is, as nats.enabled is false" .Values.nats.url }}
{{- end -}}
{{- end }}

{{/* What every process is told of the broker; .prefix is AGGREGATOR, EDGE, ... */}}
{{- define "seedwire.environment" -}}
- name: SEEDWIRE_{{ .prefix }}_SERVERS
  value: {{ include "seedwire.broker" .root | quote }}
{{- if and .root.Values.identity.secret .identified }}
- name: SEEDWIRE_{{ .prefix }}_CREDS_FILE
  value: /run/seedwire/creds
- name: SEEDWIRE_{{ .prefix }}_CA_FILE
  value: /run/seedwire/ca.pem
- name: SEEDWIRE_{{ .prefix }}_TLS_NAME
  value: seedwire
{{- end }}
{{- range $name, $value := .env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{/* Its own credentials of the Secret, and what it trusts; .more: further items. */}}
{{- define "seedwire.identity" -}}
- name: identity
  secret:
    secretName: {{ .root.Values.identity.secret }}
    defaultMode: 0440
    items:
      - {key: {{ .creds }}.creds, path: creds}
      - {key: cert.pem, path: ca.pem}
{{- range .more }}
      - {key: {{ . }}, path: {{ . }}}
{{- end }}
{{- end }}

{{- define "seedwire.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "seedwire.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Asked as its users ask it; a broker that is away restarts nothing. */}}
{{- define "seedwire.probes" -}}
readinessProbe:
  exec: {command: [python, -m, shared.healthcheck, {{ . }}]}
  periodSeconds: 15
  timeoutSeconds: 10
livenessProbe:
  exec: {command: [python, -m, shared.healthcheck, {{ . }}, --alive]}
  initialDelaySeconds: 30
  periodSeconds: 60
  timeoutSeconds: 10
{{- end }}

{{- define "seedwire.placement" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- end }}
