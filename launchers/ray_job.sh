#!/usr/bin/env bash
# Submits a rec-dist command to a running Ray cluster and streams its log.
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 launchers/ray_job.sh train configs/quickstart-sdpo.yaml cluster.num_workers=8
# The nodes need rec-dist installed (see Dockerfile), and run_dir, data.path and REC_DIST_CACHE on storage that all of them see.
set -euo pipefail

if (($# < 2)); then
  echo "usage: $0 COMMAND CONFIG.yaml [section.key=value ...]" >&2
  exit 2
fi
: "${RAY_API_SERVER_ADDRESS:?set it to the cluster's dashboard, such as http://HEAD:8265}"

cd "$(dirname "$0")/.."
exec ray job submit --working-dir . \
  --runtime-env-json '{"excludes": [".git", ".venv", "runs", "data"], "env_vars": {"RAY_ADDRESS": "auto"}}' \
  -- rec-dist "$@"
