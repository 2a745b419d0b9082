"""The section `submit`: how a run is sent to a Ray cluster, to SLURM or to Kubernetes. Nothing here changes a run."""

from typing import Literal

from pydantic import Field

from rec_dist.config.section import Section


class RayJobConfig(Section):
    """--to ray: a running Ray cluster, through its job server."""

    address: str | None = Field(
        None, description="Address of the cluster's dashboard, such as http://HEAD:8265. None: RAY_API_SERVER_ADDRESS."
    )
    submission_id: str | None = Field(None, description="Name of the job on the cluster. None: submit.name and the time.")
    ship: Literal["installed", "source", "wheel"] = Field(
        "installed",
        description="installed: the nodes have rec-dist. source: send the packages of this installation. wheel: "
        "send those in submit.ray.wheel.",
    )
    wheel: str | None = Field(None, description="ship=wheel: a wheel of rec-dist. It is unpacked; nothing is installed.")
    excludes: list[str] = Field(
        default_factory=lambda: ["__pycache__", "*.pyc"], description="What is not sent. Patterns as in .gitignore."
    )


class SlurmConfig(Section):
    """--to slurm: a batch job that starts one Ray node on each machine."""

    nodes: int = Field(1, ge=1, description="Number of nodes.")
    gpus_per_node: int = Field(0, ge=0, description="GPUs of each node. `prepare` requests none.")
    cpus_per_node: int | None = Field(None, ge=1, description="CPUs of each node. None: the cluster's default.")
    memory_per_node: str | None = Field(
        None, description='Memory of each node, such as 200G. "0" (in quotes): all of it. None: the default.'
    )
    time: str | None = Field(
        None,
        description="Time limit of one attempt, such as 1-00:00:00. Must exceed checkpoint.grace_seconds. None: "
        "the cluster's default.",
    )
    partition: str | None = Field(None, description="Partition. None: the cluster's default.")
    account: str | None = Field(None, description="Account to charge. None: yours.")
    options: list[str] = Field(default_factory=list, description="More options of sbatch, such as --qos=high.")
    requeue: bool = Field(True, description="Put a run that was stopped before the limit back into the queue.")
    interface: str | None = Field(
        None,
        description="Network interface for Ray, NCCL and gloo, such as ib0. None: that of the default route; NCCL "
        "chooses its own.",
    )
    setup: list[str] = Field(
        default_factory=list, description="Shell lines that each node runs first, such as `module load cuda`."
    )
    container: Literal["none", "enroot", "apptainer"] = Field(
        "none", description="Container runtime. enroot: through the pyxis options of srun."
    )
    image: str | None = Field(None, description="The container's image.")
    mounts: list[str] = Field(default_factory=list, description="More folders of the host in the container, as HOST:INSIDE.")
    scratch: str = Field(
        "/tmp", description="Local folder of each node for Ray's sockets and logs. Keep it short: sockets allow 107 bytes."
    )
    log_dir: str | None = Field(None, description="Folder for the script, its output and Ray's logs. None: <run_dir>-slurm.")
    start_seconds: int = Field(600, ge=1, description="Seconds that the nodes may take to join before the job fails.")
    template: str | None = Field(None, description="Your edited copy of launchers/slurm.sbatch.j2. None: that file.")


class KubeRayConfig(Section):
    """--to kuberay: a RayJob for the KubeRay operator, or a RayService with submit.command=serve."""

    image: str = Field("rec-dist:latest", description="Image with rec-dist, such as the one that Dockerfile builds.")
    namespace: str = Field("default", description="Namespace.")
    job_name: str | None = Field(
        None,
        description="Name of the RayJob and its ConfigMap, or of the RayService. None: submit.name, for a RayJob with the time.",
    )
    claim: str = Field("rec-dist", description="PersistentVolumeClaim that all pods mount at submit.storage.")
    workers: int = Field(1, ge=1, description="Worker pods.")
    gpus_per_worker: int = Field(1, ge=0, description="GPUs of each worker pod. `prepare` requests none.")
    gpu_resource: str = Field("nvidia.com/gpu", description="Name of the GPU resource on this cluster.")
    cpus_per_worker: int = Field(8, ge=1, description="CPUs of each worker pod.")
    memory_per_worker: str = Field("64Gi", description="Memory of each worker pod.")
    shared_memory: str = Field("16Gi", description="Part of that memory for /dev/shm, which Ray's object store and NCCL use.")
    head_cpus: int = Field(2, ge=1, description="CPUs of the head pod, which runs no worker.")
    head_memory: str = Field("8Gi", description="Memory of the head pod.")
    env_from_secret: str | None = Field(
        None, description="A Secret whose entries become environment variables of all pods, such as AWS_ACCESS_KEY_ID."
    )
    service_account: str | None = Field(None, description="Service account of all pods. None: the namespace's default.")
    token_secret: str | None = Field(
        None,
        description="submit.command=serve: a Secret with the entry REC_DIST_SERVE_TOKEN, the token that callers of the server send.",
    )
    retries: int = Field(3, ge=0, description="RayJob: new clusters after a failure. Each continues from the newest checkpoint.")
    suspend: bool = Field(False, description="Create the RayJob suspended, for a queue (Kueue) that starts it.")
    labels: dict[str, str] = Field(
        default_factory=dict, description="Labels of the RayJob or RayService, such as kueue.x-k8s.io/queue-name."
    )
    node_selector: dict[str, str] = Field(default_factory=dict, description="Labels of the nodes that worker pods may go to.")
    ttl_seconds: int = Field(600, ge=0, description="RayJob: seconds that the pods stay after the end.")
    ray_version: str | None = Field(None, description="Ray's version in the image. None: the one installed here.")
    template: str | None = Field(None, description="Your edited copy of launchers/kuberay.yaml.j2. None: that file.")


class ServeConfig(Section):
    """submit.command=serve: the options of `rec-dist serve` for each replica."""

    queue: int = Field(256, ge=1, description="Requests that may wait at a replica; others get 429.")
    deadline_seconds: float = Field(30.0, ge=0.01, le=3600, description="Requests that take longer get 504.")
    prompt_cache_mib: int | None = Field(
        None,
        ge=0,
        description="Language models: memory of a replica for keys and values of prompts. None: 1024 on CPUs, 0 on GPUs.",
    )


class SubmitConfig(Section):
    """How `rec-dist submit` sends a run. Nothing here changes the run, and it may differ between attempts."""

    command: Literal["prepare", "train", "evaluate", "evaluate_base", "profile", "serve"] = Field(
        "train",
        description="Command to run there. evaluate, serve (kuberay only): the run in train.run_dir. evaluate_base: the model "
        "that it starts from.",
    )
    name: str | None = Field(
        None, description="Name of the job; only 31 letters are used. None: rec-dist- and the run directory's name."
    )
    storage: str | None = Field(
        None, description="Absolute folder that all nodes see. Relative paths start there. None (slurm only): this folder."
    )
    env: dict[str, str] = Field(default_factory=dict, description="Environment variables of the run, such as REC_DIST_CACHE.")
    ray: RayJobConfig = Field(default_factory=lambda: RayJobConfig(), description="--to ray.")
    slurm: SlurmConfig = Field(default_factory=lambda: SlurmConfig(), description="--to slurm.")
    kuberay: KubeRayConfig = Field(default_factory=lambda: KubeRayConfig(), description="--to kuberay.")
    serve: ServeConfig = Field(default_factory=lambda: ServeConfig(), description="submit.command=serve.")
