{% extends "node.sh" %}
{% block run %}
{% block program %}{% endblock %}
IS_HOST=false
if [ "$NODE_RANK" = 0 ]; then IS_HOST=true; fi
# All nodes meet at one address. Where a worker fails, all start again from the last checkpoint.
exec "$PYTHON" -m torch.distributed.run \
  --nnodes="$NNODES" --nproc-per-node="$GPUS_PER_NODE" --max-restarts="${MAX_RESTARTS:-3}" \
  --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="${JOB_ID:-{{ name }}}" \
  --rdzv-conf="is_host=$IS_HOST,join_timeout=900" \
  "${PROGRAM[@]}" "$@"
{% endblock %}
