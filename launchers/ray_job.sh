#!/usr/bin/env bash
# Submits a rec-dist command to a running Ray cluster and batches its log.
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 launchers/ray_job.sh train quickstart:sft \
#     data.path=/shared/ml-100k train.run_dir=/shared/runs/sft cluster.num_workers=8
# The nodes need rec-dist installed (see Dockerfile). data.path, train.run_dir and train.init_from must be absolute, and they and
# REC_DIST_CACHE must lie on storage that all nodes see: a job runs in a copy of this folder without runs/ and data/.
# The exit code is that of `ray job submit`, not the run's: 0 for a stopped job too, 1 for every failure. `rec-dist submit --to ray`
# returns the run's own; `rec-dist status RUN_DIR` says where it stands.
set -euo pipefail

if (($# < 2)); then
  echo "usage: $0 COMMAND CONFIG.yaml [section.key=value ...]" >&2
  exit 2
fi
: "${RAY_API_SERVER_ADDRESS:?set it to the dashboard of the cluster, such as http://HEAD:8265}"

cd "$(dirname "$0")/.."
exec ray job submit --working-dir . \
  --runtime-env-json "{\"excludes\": [\"/.git\", \"/.venv\", \"/runs\", \"/data\"],
    \"env_vars\": {\"RAY_ADDRESS\": \"auto\", \"REC_DIST_CACHE\": \"${REC_DIST_CACHE:-}\",
      \"RAY_JOB_STOP_WAIT_TIME_S\": \"330\"}}" \
  -- rec-dist "$@"
