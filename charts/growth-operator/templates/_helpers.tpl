{{- define "growth-operator.labels" -}}
app.kubernetes.io/name: growth-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: growth-operator
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "growth-operator.selector" -}}
app.kubernetes.io/name: growth-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* One name for everything: the release's, and the chart's where the release's does not say it. */ -}}
{{- define "growth-operator.name" -}}
{{- if contains "growth-operator" .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-growth-operator{{ end }}
{{- end }}

{{- /* A ClusterRole is not in a namespace, so its name says whose it is. */ -}}
{{- define "growth-operator.role" -}}
{{- if .Values.namespaced }}{{ include "growth-operator.name" . }}{{ else }}{{ .Release.Namespace }}-{{ include "growth-operator.name" . }}{{ end }}
{{- end }}
