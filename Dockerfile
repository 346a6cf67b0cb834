# syntax=docker/dockerfile:1
# Two images:
#   docker build --target serve -t dmc .          dmc serve, batch, generate: no Megatron, no compiler, not root
#   docker build --target train -t dmc-train .    retrofits: NVIDIA's PyTorch with Transformer Engine, apex and flash-attn
# docs/cluster.md shows how they are run. tests/docker/run.py does what the RUN lines do, without Docker.
# nvcc, for the GPU kernels (--build-arg BUILD_IMAGE=ubuntu:24.04: those for CPUs alone); its Python is SERVE_IMAGE's.
ARG BUILD_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG SERVE_IMAGE=ubuntu:24.04
ARG PYTORCH_IMAGE=nvcr.io/nvidia/pytorch:25.11-py3

FROM ${BUILD_IMAGE} AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3 python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/dmc
ENV PATH=/opt/dmc/bin:$PATH
WORKDIR /src
COPY setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY docker/serve.txt docker/
# Before the sources: an edit of them does not fetch torch again.
RUN pip install --no-cache-dir -c constraints.txt -r docker/serve.txt
COPY megatron megatron
COPY examples/dmc/configs examples/dmc/configs
# --no-deps: the package as a whole needs megatron-core, what serves does not.
RUN pip install --no-cache-dir --no-deps .
WORKDIR /
RUN dmc build --in-package

FROM ${SERVE_IMAGE} AS serve
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 python3 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --no-create-home dmc && install -d -o dmc -g dmc /cache
COPY --from=build /opt/dmc /opt/dmc
ENV PATH=/opt/dmc/bin:$PATH XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /cache
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["dmc"]
CMD ["serve", "/model", "--host", "0.0.0.0", "--port", "8000"]

FROM ${PYTORCH_IMAGE} AS train
WORKDIR /opt/megatron-dmc
COPY setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY docker/train.txt docker/
# --no-deps: torch and what was compiled against it are the image's own. Its PIP_CONSTRAINT may pin others of these.
RUN PIP_CONSTRAINT='' pip install --no-cache-dir --no-deps -c constraints.txt -r docker/train.txt
COPY megatron megatron
COPY tools tools
COPY examples examples
RUN PIP_CONSTRAINT='' pip install --no-cache-dir --no-deps . \
    && python -c "import psutil, yaml, tqdm, tensorboard, matplotlib, safetensors, transformer_engine, megatron.core" \
    && python -m megatron.dmc.training.retrofit --help > /dev/null
