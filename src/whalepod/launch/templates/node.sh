#!/usr/bin/env bash
{{ comment }}
#
# One of these runs on each of {{ nodes }} node{{ "s" if nodes > 1 }}. From the environment:
{% if nodes > 1 %}
#   NODE_RANK    this node's number, from 0
#   MASTER_ADDR  node 0's name or address, which all nodes reach; MASTER_PORT there ({{ port }})
{% endif %}
{% block variables %}{% endblock %}
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
SHARED_DIR="${SHARED_DIR:-$HERE}" # a folder that all nodes see, for results and caches
NNODES={{ nodes }}
GPUS_PER_NODE={{ per_node }}
{% if nodes > 1 %}
: "${NODE_RANK:?must be the number of this node, from 0}" "${MASTER_ADDR:?must be the address of node 0}"
{% else %}
NODE_RANK=0
MASTER_ADDR="${MASTER_ADDR:-localhost}"
{% endif %}
MASTER_PORT="${MASTER_PORT:-{{ port }}}"
export HF_HOME="${HF_HOME:-$SHARED_DIR/huggingface}"
{% if nodes > 1 and cuda %}
# NCCL finds the network itself. Where nodes meet but the first collective hangs, tell it:
# export NCCL_SOCKET_IFNAME=eth0 # the interface of the addresses above
# export NCCL_IB_HCA=mlx5        # InfiniBand or RoCE adapters
# export NCCL_IB_GID_INDEX=3     # RoCE v2
{% endif %}

{% block run %}{% endblock %}

