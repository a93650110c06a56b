{{/* Names, labels, and the settings files of both programs. */}}

{{- define "outrider.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Short enough for "-server-metrics" and the like to fit into 63 characters. */}}
{{- define "outrider.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "outrider.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "outrider.server" -}}{{ include "outrider.fullname" . }}-server{{- end -}}
{{- define "outrider.agent" -}}{{ include "outrider.fullname" . }}-agent{{- end -}}

{{/* Labels that select the Pods of a component: {root, component}. They can never be changed. */}}
{{- define "outrider.selectorLabels" -}}
app.kubernetes.io/name: {{ include "outrider.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Labels of every object: {root, component}. */}}
{{- define "outrider.labels" -}}
{{ include "outrider.selectorLabels" . }}
app.kubernetes.io/part-of: outrider
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/*
Labels of a Pod: {root, component, own}. Without versions: a new version of the chart that changes
nothing about a Pod must not restart it on every node.
*/}}
{{- define "outrider.podLabels" -}}
{{ mergeOverwrite (deepCopy .own) (include "outrider.selectorLabels" . | fromYaml) | toYaml }}
app.kubernetes.io/part-of: outrider
{{- end -}}

{{/* An image: {root, image}. */}}
{{- define "outrider.image" -}}
{{- with .root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- .image.repository -}}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .image.tag | default .root.Chart.AppVersion }}{{ end -}}
{{- end -}}

{{- define "outrider.metricsAnnotations" -}}
{{- if .root.Values.metrics.annotations -}}
prometheus.io/scrape: "true"
prometheus.io/port: {{ .port | quote }}
prometheus.io/path: /metrics
{{- end }}
{{- end -}}

{{/* Who and where a Pod is, for the programs' settings and logs. */}}
{{- define "outrider.downwardEnv" -}}
- {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
- {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
{{- end -}}

{{/* A token of the Pod's ServiceAccount that only Outrider's server takes. */}}
{{- define "outrider.tokenVolume" -}}
- name: token
  projected:
    defaultMode: 0440
    sources:
    - serviceAccountToken:
        path: token
        audience: outrider
        expirationSeconds: 600
{{- end -}}

{{/* How the server's certificate is made: generated, existing or certManager. */}}
{{- define "outrider.tlsMode" -}}
{{- if .Values.tls.existingSecret -}}
{{- if .Values.tls.certManager.enabled -}}
{{- fail "tls.existingSecret and tls.certManager.enabled exclude each other: keep one" -}}
{{- end -}}
existing
{{- else if .Values.tls.certManager.enabled -}}
certManager
{{- else -}}
generated
{{- end -}}
{{- end -}}

{{- define "outrider.tlsSecret" -}}
{{- .Values.tls.existingSecret | default (printf "%s-tls" (include "outrider.fullname" .)) -}}
{{- end -}}

{{/* The name the agents demand in the server's certificate. */}}
{{- define "outrider.serverName" -}}
{{- printf "%s.%s.svc" (include "outrider.server" .) .Release.Namespace -}}
{{- end -}}

{{/* All names in the server's certificate, as a YAML list. */}}
{{- define "outrider.dnsNames" -}}
{{- $service := include "outrider.server" . -}}
{{- $names := list $service (printf "%s.%s" $service .Release.Namespace) (include "outrider.serverName" .) -}}
{{- $names = append $names (printf "%s.%s.svc.cluster.local" $service .Release.Namespace) -}}
{{- $names = append $names "localhost" -}}
{{- concat $names .Values.tls.extraDnsNames | uniq | toYaml -}}
{{- end -}}

{{/* How the server speaks to Kafka: files of Secrets, never what is in them. */}}
{{- define "outrider.kafkaSecurity" -}}
{{- $security := .Values.sink.kafka.security -}}
{{- $sasl := hasPrefix "sasl_" $security.protocol -}}
{{- $tls := hasSuffix "ssl" $security.protocol -}}
{{- if and $sasl (not $security.userSecret) -}}
{{- fail (printf "sink.kafka.security.protocol is %s: set sink.kafka.security.userSecret, a Secret with username and password" $security.protocol) -}}
{{- end -}}
{{- if and (not $sasl) $security.userSecret -}}
{{- fail "sink.kafka.security.userSecret is set: set sink.kafka.security.protocol to sasl_ssl or sasl_plaintext" -}}
{{- end -}}
{{- if and (not $tls) (or $security.caSecret $security.certificateSecret) -}}
{{- fail "Secrets with certificates are set: set sink.kafka.security.protocol to ssl or sasl_ssl" -}}
{{- end -}}
{{- $files := "/etc/outrider/kafka" -}}
{{- $found := dict "protocol" $security.protocol "mechanism" $security.mechanism -}}
{{- if $sasl -}}
{{- $_ := set $found "usernameFile" (printf "%s/username" $files) -}}
{{- $_ := set $found "passwordFile" (printf "%s/password" $files) -}}
{{- end -}}
{{- if $security.caSecret -}}
{{- $_ := set $found "caFile" (printf "%s/ca.crt" $files) -}}
{{- end -}}
{{- if $security.certificateSecret -}}
{{- $_ := set $found "certFile" (printf "%s/tls.crt" $files) -}}
{{- $_ := set $found "keyFile" (printf "%s/tls.key" $files) -}}
{{- end -}}
{{- toYaml $found -}}
{{- end -}}

{{/* Those files, as sources of a projected volume at /etc/outrider. */}}
{{- define "outrider.kafkaSources" -}}
{{- $security := .Values.sink.kafka.security -}}
{{- with $security.userSecret }}
- secret:
    name: {{ . }}
    items:
    - {key: username, path: kafka/username}
    - {key: password, path: kafka/password}
{{- end }}
{{- with $security.caSecret }}
- secret:
    name: {{ . }}
    items:
    - {key: ca.crt, path: kafka/ca.crt}
{{- end }}
{{- with $security.certificateSecret }}
- secret:
    name: {{ . }}
    items:
    - {key: tls.crt, path: kafka/tls.crt}
    - {key: tls.key, path: kafka/tls.key}
{{- end }}
{{- end -}}

{{/* The server's settings file. */}}
{{- define "outrider.serverSettings" -}}
{{- $sink := dict "kind" .Values.sink.kind -}}
{{- if eq .Values.sink.kind "kafka" -}}
{{- if not .Values.sink.kafka.bootstrapServers -}}
{{- fail "sink.kind is kafka: set sink.kafka.bootstrapServers, such as [kafka:9092]" -}}
{{- end -}}
{{- $_ := set $sink "kafka" (dict
  "bootstrapServers" .Values.sink.kafka.bootstrapServers
  "topic" .Values.sink.kafka.topic
  "format" .Values.sink.kafka.format
  "routes" .Values.sink.kafka.routes
  "security" (include "outrider.kafkaSecurity" . | fromYaml)) -}}
{{- else -}}
{{- $_ := set $sink "file" (dict "directory" "/var/lib/outrider/records" "maxTotalBytes" .Values.sink.file.maxTotalBytes) -}}
{{- end -}}
{{- $settings := dict
  "log" (dict "level" .Values.server.log.level "format" .Values.server.log.format)
  "ops" (dict "address" ":8080")
  "gateway" (dict
    "address" ":8443"
    "tls" (dict "certFile" "/etc/outrider/tls/tls.crt" "keyFile" "/etc/outrider/tls/tls.key"))
  "auth" (dict
    "audience" "outrider"
    "agentServiceAccounts" (list (printf "%s/%s" .Release.Namespace (include "outrider.agent" .)))
    "serverServiceAccounts" (list (printf "%s/%s" .Release.Namespace (include "outrider.server" .))))
  "sink" $sink
  "leader" (dict "leaseName" (include "outrider.lease" .))
  "fleet" (dict
    "gateways" (printf "srv:_grpc._tcp.%s" (include "outrider.serverName" .))
    "serverName" (include "outrider.serverName" .)
    "caFile" "/etc/outrider/tls/ca.crt"
    "tokenFile" "/var/run/secrets/outrider/token")
-}}
{{- mergeOverwrite $settings (deepCopy .Values.server.settings) | toYaml -}}
{{- end -}}

{{/* The agent's settings file. */}}
{{- define "outrider.agentSettings" -}}
{{- $settings := dict
  "log" (dict "level" .Values.agent.log.level "format" .Values.agent.log.format)
  "ops" (dict "address" ":8081")
  "server" (dict
    "target" (printf "srv:_grpc._tcp.%s" (include "outrider.serverName" .))
    "serverName" (include "outrider.serverName" .)
    "caFile" "/etc/outrider/tls/ca.crt"
    "tokenFile" "/var/run/secrets/outrider/token")
  "state" (dict "directory" "/var/lib/outrider")
  "tasks" (dict
    "allowHost" (eq .Values.agent.hostAccess "full")
    "allowedUsers" .Values.agent.allowedUsers)
-}}
{{- if .Values.agent.hostMounts }}
{{- $_ := set $settings "node" (dict "proc" "/host/proc" "sys" "/host/sys" "root" "/host/root") }}
{{- else if eq .Values.agent.hostAccess "full" }}
{{- /* In the host's process namespace its init has the host's root. */ -}}
{{- $_ := set $settings "node" (dict "root" "/proc/1/root") }}
{{- else }}
{{- /* Only what a container sees of its node, and nothing of the container as if it were the node's. */ -}}
{{- $seen := list "cpu" "diskstats" "filefd" "hwmon" "loadavg" "meminfo" "pressure" "stat" "thermal_zone" "time" "uname" "vmstat" }}
{{- if .Values.agent.hostNetwork }}
{{- $seen = concat $seen (list "conntrack" "netclass" "netdev" "netstat" "sockstat") }}
{{- end }}
{{- $kinds := ternary (list "modules" "ports") (list "modules") .Values.agent.hostNetwork }}
{{- $_ := set $settings "collectors" (dict "nodeMetrics" (dict "collectors" $seen) "inventory" (dict "kinds" $kinds)) }}
{{- end }}
{{- $plugins := dict }}
{{- with .Values.agent.plugins.caConfigMap }}
{{- $_ := set $plugins "caFile" "/etc/outrider/plugins/ca.crt" }}
{{- end }}
{{- with .Values.agent.plugins.publicKeys }}
{{- $files := list }}
{{- range $name := keys . | sortAlpha }}
{{- $files = append $files (printf "/etc/outrider/plugin-key-%s" $name) }}
{{- end }}
{{- $_ := set $plugins "publicKeys" $files }}
{{- end }}
{{- if $plugins }}
{{- $_ := set $settings "plugins" $plugins }}
{{- end }}
{{- mergeOverwrite $settings (deepCopy .Values.agent.settings) | toYaml -}}
{{- end -}}

{{/* The CA's certificate, without a key, as a source of a projected volume. */}}
{{- define "outrider.caSource" -}}
{{- if eq (include "outrider.tlsMode" .) "generated" -}}
- configMap:
    name: {{ include "outrider.fullname" . }}-ca
{{- else if .Values.tls.caConfigMap -}}
- configMap:
    name: {{ .Values.tls.caConfigMap }}
{{- else -}}
- secret:
    name: {{ include "outrider.tlsSecret" . }}
{{- end }}
    items:
    - {key: ca.crt, path: tls/ca.crt}
{{- end -}}

{{- define "outrider.lease" -}}{{ include "outrider.fullname" . }}-leader{{- end -}}
