# rec-dist with the pins of constraints.txt.
#   GPU (default):  docker build -t rec-dist .
#   CPU:            docker build -t rec-dist:cpu --build-arg BASE=python:3.11-slim-bookworm --build-arg TORCH_INDEX=URL .
#                   with URL the index of PyTorch's CPU wheels
# Give the container shared memory for NCCL and Ray: docker run --gpus all --shm-size 16g ...
ARG BASE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04
FROM ${BASE}

ARG TORCH_INDEX=""
ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    REC_DIST_CACHE=/cache \
    PATH=/opt/rec-dist/bin:$PATH

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# gcc and the Python headers: Triton builds its launcher at the first kernel. wget: KubeRay's probes call it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev make git wget python3 python3-venv python3-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN python3 -m venv /opt/rec-dist \
    && if [[ -n "${TORCH_INDEX}" ]]; then pip install --index-url "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)"; fi \
    && pip install -c constraints.txt torch setuptools wheel

COPY rec_dist ./rec_dist
COPY kernels ./kernels
COPY launchers ./launchers
COPY configs ./configs
RUN pip install -c constraints.txt '.[gguf,serve]'
VOLUME ["/cache"]
ENTRYPOINT ["rec-dist"]
CMD ["--help"]
