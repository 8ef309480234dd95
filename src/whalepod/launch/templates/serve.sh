{% extends "node.sh" %}
{% block variables %}
#   MODEL        a folder or a name on the hub ({{ model | comment }})
{% if count > 1 %}
#   WORKER       number of this server, from 0, of {{ count }} that are alike
{% endif %}
#   HOST, PORT   where it listens; API_KEY, if set, is asked of clients
{% endblock %}
{% block run %}
MODEL=${MODEL:-{{ model | q }}}
HOST="${HOST:-{{ host }}}"
PORT="${PORT:-$(({{ listen }} + ${WORKER:-0}))}"
{% for name, value in environment.items() %}
export {{ name }}="${{ "{" }}{{ name }}:-{{ value }}}"
{% endfor %}
FLAGS=(
{% for line in flags %}
  {{ line }}
{% endfor %}
)
{% if nodes > 1 %}
{% if engine == "vllm" %}
FLAGS+=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
if [ "$NODE_RANK" != 0 ]; then FLAGS+=(--headless); fi
{% else %}
FLAGS+=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --dist-init-addr "$MASTER_ADDR:$MASTER_PORT")
{% endif %}
{% endif %}
{% if engine == "sglang" and pool != "serve" %}
if [ -n "${IB_DEVICE:-}" ]; then FLAGS+=(--disaggregation-ib-device "$IB_DEVICE"); fi
{% endif %}
if [ -n "${API_KEY:-}" ]; then FLAGS+=(--api-key "$API_KEY"); fi
echo "{{ name }}: $GPUS_PER_NODE GPUs of node $NODE_RANK of $NNODES ($MASTER_ADDR:$MASTER_PORT)"
{% if engine == "vllm" %}
exec vllm serve "$MODEL" --host "$HOST" --port "$PORT" "${FLAGS[@]}" "$@"
{% else %}
exec "${PYTHON:-python3}" -m sglang.launch_server --model-path "$MODEL" --host "$HOST" --port "$PORT" "${FLAGS[@]}" "$@"
{% endif %}
{% endblock %}
