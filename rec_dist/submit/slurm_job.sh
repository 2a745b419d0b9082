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
rm -f "$folder"/head "$folder"/done "$folder"/failed
printf '%s\n' "$config" > "$folder/config.yaml"

# A token of this job alone, handed on in the environment, keeps others on the network out of its Ray cluster.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN
export RAY_USAGE_STATS_ENABLED=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # on SIGTERM it would wait 30 s for work to leave the node; ours has ended by then
if [[ -n $interface ]]; then export NCCL_SOCKET_IFNAME=$interface GLOO_SOCKET_IFNAME=$interface; fi

# What each node runs. Ray's ports are free ones, asked from the system, and its folder bears the job's number: two jobs can share
# a node. `ray stop` is never called, since it ends the Ray of every job on the node.
{
  declare -f setup
  declare -p folder scratch interface start_seconds
  cat << 'NODE'
set -euo pipefail
trap 'touch "$folder/failed"' EXIT # so that nobody waits for this node
ulimit -n "$(ulimit -Hn)" || true # Ray needs many open files
setup
address() {
  python - "$interface" << 'PYTHON'
import fcntl, socket, struct, sys

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    found = {}  # of IPv4 interfaces
    for _, name in socket.if_nameindex():
        try:
            SIOCGIFADDR = 0x8915
            found[name] = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24])
        except OSError:
            pass
    name, host = sys.argv[1], socket.gethostname()
    if name:
        if name not in found:
            sys.exit(f"error: submit.slurm.interface ({name}) is no interface with an address on {host}")
        own = found[name]
    else:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: asks which address the default route has
        except OSError as fault:
            sys.exit(f"error: {host} has no default route ({fault.strerror}); set submit.slurm.interface")
        own = probe.getsockname()[0]
        name = next((one for one in found if found[one] == own), "")
held = [socket.socket() for _ in range(5)]
for one in held:
    one.bind(("", 0))
print(own, *[one.getsockname()[1] for one in held], name)
PYTHON
}
read -r ip gcs client agent agent_grpc metrics device <<< "$(address)"
[[ -n $ip ]]
# gloo would take the address of the host's name, which on many systems is 127.0.1.1. NCCL looks for the fastest interface itself.
if [[ -n $device ]]; then export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$device}; fi
# Folders of ours whose job was killed before it could clean up: nobody holds their lock any more.
for left in "$scratch"/rd*.*; do
  if [[ -O $left/lock ]] && flock --nonblock "$left/lock" true; then
    rm -rf "$left" 2> /dev/null || true # another job may be removing it, too
  fi
done
# With its attempt's number: after a node was set down, the attempt before may still be ending on it. It takes the name that others look
# for once it is locked.
own=$scratch/rd$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$SLURM_PROCID
new=$(mktemp -d "$scratch/.rdXXXXXX")
exec 9> "$new/lock"
flock 9 || true
mv -T "$new" "$own"
ray=
family() { # a process and all that it started
  echo "$1"
  local child
  for child in $(pgrep -P "$1"); do family "$child"; done
}
finish() {
  trap - EXIT
  trap '' TERM INT # scancel sends it to this script, and srun hands it on once more
  if [[ ! -e $folder/done ]]; then touch "$folder/failed"; fi
  if [[ -n $ray ]]; then
    read -r -d '' -a all <<< "$(family "$ray")" || true
    kill -TERM "$ray" 2> /dev/null || true
    for _ in {1..8}; do # scancel kills this script, too, within SLURM's KillWait (30 s), and the logs are to be copied before
      kill -0 "$ray" 2> /dev/null || break
      sleep 1
    done
    # Agents and workers change their names, and an agent whose raylet was killed stays for a minute.
    kill -KILL "${all[@]}" 2> /dev/null || true
    pkill -KILL -f -- "$own/session" || true
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
  ray start --head "--port=$gcs" "--ray-client-server-port=$client" --include-dashboard=false "${options[@]}" > "$folder/ray-$SLURM_PROCID.txt" 2>&1 &
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
python - "$SLURM_JOB_NUM_NODES" "$start_seconds" "$folder/failed" << 'PYTHON'
import os, sys, time
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
    if os.path.exists(sys.argv[3]):
        sys.exit(f"error: {found} of {wanted} nodes joined, and on one Ray ended; see {os.path.dirname(sys.argv[3])}")
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
  if [[ -e $folder/failed ]] || ! kill -0 "$nodes" 2> /dev/null || ((waited++ > start_seconds)); then
    echo "error: Ray did not start; see $folder" >&2
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
