#!/usr/bin/env bash
{{ comment }}
#
# The address that clients speak to, before all servers. Their addresses, divided by blanks:
{% for pool in pools %}
#   {{ pool.name | upper }}_URLS  of {{ pool.count }}: "http://HOST:{{ listen }} ..."
{% endfor %}
set -euo pipefail

{% for pool in pools %}
read -r -a {{ pool.name | upper }} <<<"${{ "{" }}{{ pool.name | upper }}_URLS:?must be addresses of servers}"
{% endfor %}
FLAGS=(--host "${HOST:-{{ host }}}" --port "${PORT:-8000}" --worker-startup-timeout-secs 7200)
{% if disaggregated %}
FLAGS+=(--pd-disaggregation)
for url in "${PREFILL[@]}"; do FLAGS+=(--prefill "$url" "${BOOTSTRAP_PORT:-8998}"); done
for url in "${DECODE[@]}"; do FLAGS+=(--decode "$url"); done
{% else %}
FLAGS+=(--worker-urls "${SERVE[@]}")
{% endif %}
if [ -n "${API_KEY:-}" ]; then FLAGS+=(--api-key "$API_KEY"); fi
exec "${PYTHON:-python3}" -m sglang_router.launch_router "${FLAGS[@]}" "$@"

