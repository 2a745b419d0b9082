# rec-dist with the pins of constraints.txt.
#   GPU (default):  docker build -t rec-dist .
#   CPU:            docker build -t rec-dist:cpu --build-arg BASE=python:3.11-slim-bookworm --build-arg TORCH_INDEX=URL .
#                   with URL the index of PyTorch's CPU wheels
# Give the container shared memory for NCCL and Ray: docker run --gpus all --shm-size 16g ...
# It runs as the user rec-dist (10001); mount folders that this user may write, or name yours: docker run --user "$(id -u):$(id -g)" ...
# The base is the operator's choice: --build-arg BASE=NAME@sha256:DIGEST pins it. With a requirements.txt (`make hashes`, made with the
# Python of the base) every package is checked against its SHA-256.
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
COPY constraints.txt requirements.tx[t] pyproject.toml README.md LICENSE ./
RUN python3 -m venv /opt/rec-dist \
    && if [[ -e requirements.txt ]]; then \
      pip install --require-hashes ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -r requirements.txt; \
    else \
      if [[ -n "${TORCH_INDEX}" ]]; then pip install --index-url "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)"; fi \
      && pip install -c constraints.txt torch setuptools wheel; \
    fi

COPY rec_dist ./rec_dist
COPY kernels ./kernels
COPY launchers ./launchers
COPY configs ./configs
RUN if [[ -e requirements.txt ]]; then pip install --no-deps --no-build-isolation .; else pip install -c constraints.txt '.[gguf,serve]'; fi

# Numeric, so that Kubernetes can see that it is not root. HOME and the cache may be written by whichever user runs it.
RUN useradd --uid 10001 --create-home rec-dist \
    && mkdir -p /cache && chown rec-dist /cache /workspace && chmod 1777 /cache /home/rec-dist
ENV HOME=/home/rec-dist
USER 10001
VOLUME ["/cache"]
ENTRYPOINT ["rec-dist"]
CMD ["--help"]
