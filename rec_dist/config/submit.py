"""What `rec-dist submit` can be told: how a run is sent to a Ray cluster, to SLURM or to Kubernetes. Nothing here changes a run."""

from typing import Literal

from pydantic import Field

from rec_dist.config.section import Section


class RayJobConfig(Section):
    """--to ray: a running Ray cluster, through its job server."""

    address: str | None = Field(
        None, description="The cluster's dashboard, such as http://HEAD:8265; None: RAY_API_SERVER_ADDRESS."
    )
    submission_id: str | None = Field(None, description="Name of the job on the cluster; None: submit.name and the time.")
    ship: Literal["installed", "source", "wheel"] = Field(
        "installed",
        description="installed: the nodes have rec-dist. source: these packages go along. wheel: submit.ray.wheel's do.",
    )
    wheel: str | None = Field(None, description="ship=wheel: a wheel of rec-dist; it is unpacked, and nothing is installed.")
    excludes: list[str] = Field(
        default_factory=lambda: ["__pycache__", "*.pyc"], description="Left out of what goes along; patterns as in .gitignore."
    )


class SlurmConfig(Section):
    """--to slurm: a batch job that starts one Ray node a machine."""

    nodes: int = Field(1, ge=1, description="Nodes.")
    gpus_per_node: int = Field(0, ge=0, description="GPUs of a node; `prepare` asks for none.")
    cpus_per_node: int | None = Field(None, ge=1, description="CPUs of a node; None: the cluster's default.")
    memory_per_node: str | None = Field(None, description='Such as 200G; "0" (a text): all of a node; None: the default.')
    time: str | None = Field(
        None,
        description="Limit of one attempt, such as 1-00:00:00, longer than checkpoint.grace_seconds; None: the cluster's default.",
    )
    partition: str | None = Field(None, description="Partition; None: the cluster's default.")
    account: str | None = Field(None, description="Account that pays; None: yours.")
    options: list[str] = Field(default_factory=list, description="Further options of sbatch, such as --qos=high.")
    requeue: bool = Field(True, description="A run that was stopped before the limit goes back into the queue by itself.")
    interface: str | None = Field(
        None, description="Network interface of Ray, NCCL and gloo, such as ib0; None: the default route's, and NCCL chooses."
    )
    setup: list[str] = Field(default_factory=list, description="Shell lines that each node runs first, such as module load cuda.")
    container: Literal["none", "enroot", "apptainer"] = Field("none", description="enroot: through srun's pyxis options.")
    image: str | None = Field(None, description="The container's image.")
    mounts: list[str] = Field(default_factory=list, description="Further folders of the host in the container, HOST:INSIDE.")
    scratch: str = Field("/tmp", description="Local folder of a node for Ray's sockets and logs; short, sockets allow 107 bytes.")
    log_dir: str | None = Field(None, description="Script, output and Ray's logs; None: <run_dir>-slurm.")
    start_seconds: int = Field(600, ge=1, description="How long the nodes may take to join before the job fails, seconds.")
    template: str | None = Field(None, description="Your edited copy of launchers/slurm.sbatch.j2; None: that file.")


class KubeRayConfig(Section):
    """--to kuberay: a RayJob for the KubeRay operator."""

    image: str = Field("rec-dist:latest", description="Image with rec-dist, such as Dockerfile builds.")
    namespace: str = Field("default", description="Namespace.")
    job_name: str | None = Field(None, description="Name of the RayJob and its ConfigMap; None: submit.name and the time.")
    claim: str = Field("rec-dist", description="PersistentVolumeClaim that all pods mount at submit.storage.")
    workers: int = Field(1, ge=1, description="Worker pods.")
    gpus_per_worker: int = Field(1, ge=0, description="GPUs of a worker pod; `prepare` asks for none.")
    gpu_resource: str = Field("nvidia.com/gpu", description="What the GPUs are called on this cluster.")
    cpus_per_worker: int = Field(8, ge=1, description="CPUs of a worker pod.")
    memory_per_worker: str = Field("64Gi", description="Memory of a worker pod.")
    shared_memory: str = Field("16Gi", description="Of it, /dev/shm, for Ray's object store and NCCL.")
    head_cpus: int = Field(2, ge=1, description="CPUs of the head pod, which runs no worker.")
    head_memory: str = Field("8Gi", description="Memory of the head pod.")
    env_from_secret: str | None = Field(
        None, description="A Secret whose entries are environment variables in all pods, such as AWS_ACCESS_KEY_ID."
    )
    service_account: str | None = Field(None, description="Service account of all pods; None: the namespace's default.")
    retries: int = Field(3, ge=0, description="New clusters after a failed one; each goes on from the newest checkpoint.")
    suspend: bool = Field(False, description="Created asleep, for a queue (Kueue) that wakes it.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels of the RayJob, such as kueue.x-k8s.io/queue-name.")
    node_selector: dict[str, str] = Field(default_factory=dict, description="Labels of the nodes that worker pods may go to.")
    ttl_seconds: int = Field(600, ge=0, description="How long the pods stay after the end, seconds.")
    ray_version: str | None = Field(None, description="Ray's version in the image; None: the one installed here.")
    template: str | None = Field(None, description="Your edited copy of launchers/rayjob.yaml.j2; None: that file.")


class SubmitConfig(Section):
    """How `rec-dist submit` sends a run."""

    command: Literal["prepare", "train", "evaluate", "evaluate_base", "profile"] = Field(
        "train", description="What runs there. evaluate: of the run in train.run_dir. evaluate_base: of the model it starts from."
    )
    name: str | None = Field(
        None, description="Name of the job, of which 31 letters count; None: rec-dist- and the run directory's name."
    )
    storage: str | None = Field(
        None, description="Absolute folder that all nodes see; relative paths lie in it. None (slurm only): this folder."
    )
    env: dict[str, str] = Field(default_factory=dict, description="Environment variables of the run, such as REC_DIST_CACHE.")
    ray: RayJobConfig = Field(default_factory=lambda: RayJobConfig(), description="--to ray.")
    slurm: SlurmConfig = Field(default_factory=lambda: SlurmConfig(), description="--to slurm.")
    kuberay: KubeRayConfig = Field(default_factory=lambda: KubeRayConfig(), description="--to kuberay.")
