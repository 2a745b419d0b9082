# From here on the same for every job (rec_dist/submit/slurm_job.sh): one Ray node a machine, the run, and the end.
# Set above: run_dir, log_dir, scratch, interface, start_seconds, requeue (1 or 0), step_options and inside (arrays, for containers),
# config (the text of a configuration), command (the words before its path), overrides (the words after it), setup (a function).
# Exit code: the run's. On SIGUSR1, which SLURM sends before the limit, the run saves, exits with 75 and is queued again; on
# SIGTERM (scancel --batch --signal=TERM) it saves and exits with 75.
# shellcheck disable=SC2154
set -euo pipefail

job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
folder=$log_dir/$job/attempt-${SLURM_RESTART_COUNT:-0} # seen by all nodes
mkdir -p "$folder"
rm -f "$folder"/head "$folder"/done
printf '%s\n' "$config" > "$folder/config.yaml"

# A token of this job alone, handed on in the environment, keeps others on the network out of its Ray cluster.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN
export RAY_USAGE_STATS_ENABLED=0
if [[ -n $interface ]]; then export NCCL_SOCKET_IFNAME=$interface GLOO_SOCKET_IFNAME=$interface; fi

# What each node runs. Ray's ports are free ones, asked from the system, and its folder bears the job's number: two jobs can share
# a node. `ray stop` is never called, since it ends the Ray of every job on the node.
{
  declare -f setup
  declare -p folder scratch interface start_seconds
  cat << 'NODE'
set -euo pipefail
ulimit -n "$(ulimit -Hn)" || true # Ray needs many open files
setup
address() {
  python - "$interface" << 'PYTHON'
import fcntl, socket, struct, sys

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    if sys.argv[1]:
        SIOCGIFADDR = 0x8915
        try:
            answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", sys.argv[1].encode()[:15]))
        except OSError:
            sys.exit(f"error: submit.slurm.interface ({sys.argv[1]}) is no interface with an address on {socket.gethostname()}")
        own = socket.inet_ntoa(answer[20:24])
    else:
        probe.connect(("192.0.2.1", 9))  # sends nothing: asks which address the default route has
        own = probe.getsockname()[0]
held = [socket.socket() for _ in range(4)]
for one in held:
    one.bind(("", 0))
print(own, *[one.getsockname()[1] for one in held])
PYTHON
}
read -r ip gcs agent agent_grpc metrics <<< "$(address)"
[[ -n $ip ]]
# Folders of ours whose job was killed before it could clean up: nobody holds their lock any more.
for left in "$scratch"/rd*.*; do
  if [[ -O $left/lock ]] && flock --nonblock "$left/lock" true; then rm -rf "$left"; fi
done
own=$scratch/rd$SLURM_JOB_ID.$SLURM_PROCID
(umask 077 && mkdir -p "$own")
exec 9> "$own/lock"
flock 9 || true
ray=
finish() {
  trap - EXIT
  trap '' TERM INT # scancel sends it to this script, and srun hands it on once more
  if [[ -n $ray ]]; then
    kill -TERM "$ray" 2> /dev/null || true
    for _ in {1..8}; do # scancel kills this script, too, within SLURM's KillWait (30 s), and the logs are to be copied before
      kill -0 "$ray" 2> /dev/null || break
      sleep 1
    done
    pkill -KILL -f -- "$own/session" 2> /dev/null || true
  fi
  mkdir -p "$folder/ray-$SLURM_PROCID"
  cp -r "$own"/session_latest/logs/. "$folder/ray-$SLURM_PROCID/" 2> /dev/null || true
  rm -rf "$own"
}
trap finish EXIT
trap 'exit 143' TERM INT
# shellcheck disable=SC2153 # SLURM sets both this and SLURM_GPUS_ON_NODE
options=(--block --disable-usage-stats "--node-ip-address=$ip" "--temp-dir=$own" "--num-cpus=$SLURM_CPUS_ON_NODE"
  --min-worker-port=0 --max-worker-port=0 "--dashboard-agent-listen-port=$agent" "--dashboard-agent-grpc-port=$agent_grpc"
  "--metrics-export-port=$metrics")
if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then options+=("--num-gpus=$SLURM_GPUS_ON_NODE"); fi
if ((SLURM_PROCID == 0)); then
  ray start --head "--port=$gcs" --include-dashboard=false "${options[@]}" > "$folder/ray-$SLURM_PROCID.txt" 2>&1 &
  ray=$!
  printf '%s:%s %s\n' "$ip" "$gcs" "$SLURMD_NODENAME" > "$folder/head.tmp"
  mv "$folder/head.tmp" "$folder/head"
else
  until [[ -e $folder/head ]]; do sleep 0.5; done
  read -r head _ < "$folder/head"
  until (: <> "/dev/tcp/${head%:*}/${head##*:}") 2> /dev/null; do sleep 0.5; done
  ray start "--address=$head" "${options[@]}" > "$folder/ray-$SLURM_PROCID.txt" 2>&1 &
  ray=$!
fi
while [[ ! -e $folder/done ]] && kill -0 "$ray" 2> /dev/null; do sleep 1; done
if [[ ! -e $folder/done ]]; then
  echo "error: Ray ended on $SLURMD_NODENAME; its last words:" >&2
  tail -n 5 "$folder/ray-$SLURM_PROCID.txt" >&2
  exit 1
fi
NODE
} > "$folder/node.sh"

# What the head node runs once Ray is up there.
{
  declare -f setup
  declare -p folder start_seconds command overrides
  cat << 'DRIVER'
set -euo pipefail
ulimit -n "$(ulimit -Hn)" || true
setup
read -r RAY_ADDRESS _ < "$folder/head"
export RAY_ADDRESS
python - "$SLURM_JOB_NUM_NODES" "$start_seconds" << 'PYTHON'
import sys, time
import ray

wanted, patience = int(sys.argv[1]), float(sys.argv[2])
until = time.monotonic() + patience
while True:
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=False)
        break
    except (ConnectionError, RuntimeError, ValueError) as fault:
        if time.monotonic() > until:
            sys.exit(f"error: Ray does not answer on the head node: {fault}")
        time.sleep(1)
while (found := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > until:
        sys.exit(f"error: {found} of {wanted} nodes joined within {patience:g} s (submit.slurm.start_seconds)")
    time.sleep(1)
PYTHON
exec "${command[@]}" "$folder/config.yaml" "${overrides[@]}"
DRIVER
} > "$folder/driver.sh"

nodes='' driver='' stop=''
teardown() {
  trap '' USR1 TERM
  touch "$folder/done"
  for _ in {1..60}; do # Ray ends and its logs are copied
    if [[ -z $nodes ]] || ! kill -0 "$nodes" 2> /dev/null; then break; fi
    sleep 1
  done
  kill ${driver:+"$driver"} ${nodes:+"$nodes"} 2> /dev/null || true
  wait || true
}
trap teardown EXIT
trap 'stop=requeue' USR1
trap 'stop=leave' TERM

common=(--overlap --ntasks-per-node=1 "${step_options[@]}")
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then common+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi
srun "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" "${common[@]}" "${inside[@]}" bash "$folder/node.sh" &
nodes=$!
waited=0
until [[ -e $folder/head ]]; do
  if ! kill -0 "$nodes" 2> /dev/null || ((waited++ > start_seconds)); then
    echo "error: Ray did not start on the head node; see $folder" >&2
    exit 1
  fi
  sleep 1
done
read -r _ head_node < "$folder/head"
srun --nodes=1 --ntasks=1 "--nodelist=$head_node" "${common[@]}" "${inside[@]}" bash "$folder/driver.sh" &
driver=$!
while kill -0 "$driver" 2> /dev/null; do
  # Asked again until the run ends: one that is just starting forgets an older request.
  if [[ -n $stop && -e $run_dir/config.json ]]; then : > "$run_dir/stop"; fi
  if ! kill -0 "$nodes" 2> /dev/null; then
    echo "error: Ray ended on all nodes while the run went on; see $folder" >&2
    kill "$driver" 2> /dev/null || true
  fi
  sleep 2 || true
done
code=0
wait "$driver" || code=$?
driver=''
teardown
trap - EXIT
if ((code == 75)) && [[ $stop == requeue ]] && ((requeue)); then
  echo "stopped with a checkpoint; queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
