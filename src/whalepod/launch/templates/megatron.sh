{% extends "torchrun.sh" %}
{% block variables %}
#   SHARED_DIR   holds checkpoints (OUT) and caches; this script's own folder if not set
#   BRIDGE       a checkout of NVIDIA-NeMo/Megatron-Bridge; as in its containers if not set
#   DATA         prefix of Megatron's indexed data; made-up data if not set
{% endblock %}
{% block program %}
OUT=${OUT:-{{ out }}}
PYTHON="${PYTHON:-python3}"
BRIDGE="${BRIDGE:-/opt/Megatron-Bridge}"
DATASET=(--dataset mock)
if [ -n "${DATA:-}" ]; then DATASET=(--dataset megatron-indexed "dataset.data_path=$DATA"); fi
OVERRIDES=(
{% for line in overrides %}
  {{ line | q }}
{% endfor %}
  "checkpoint.save=$OUT" "checkpoint.load=$OUT"
)
PROGRAM=("$BRIDGE/scripts/training/run_recipe.py" --recipe {{ recipe }} --mode pretrain
  "${DATASET[@]}" "${OVERRIDES[@]}")
{% endblock %}
