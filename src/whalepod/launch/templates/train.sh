{% extends "torchrun.sh" %}
{% block variables %}
#   SHARED_DIR   holds results (OUT) and caches; this script's own folder if not set
#   PYTHON       python3 that has whalepod, else whalepod is installed from SHARED_DIR/whalepod, a checkout
{% endblock %}
{% block program %}
OUT=${OUT:-{{ out }}}
PYTHON="${PYTHON:-python3}"
export WHALEPOD_CACHE="${WHALEPOD_CACHE:-$SHARED_DIR/cache}"
"$PYTHON" -c "import whalepod" 2>/dev/null || "$PYTHON" -m pip install --quiet "$SHARED_DIR/whalepod"
PROGRAM=(-m whalepod train "$HERE/run.yaml" out="$OUT")
{% endblock %}
