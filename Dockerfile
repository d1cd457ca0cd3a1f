# syntax=docker/dockerfile:1
# moe_train with everything it needs, for a user who is not root.
#
#   docker build -t moe_train .                                          for NVIDIA GPUs
#   docker build -t moe_train --build-arg BASE=debian:bookworm-slim \
#       --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .   for the CPU alone
#   docker run --rm -it --gpus all --ipc host -v "$PWD/data-bin:/moe_train/data-bin" -v "$PWD/outputs:/moe_train/outputs" \
#       moe_train moe-train data=data-bin/l10n routing=switch
#
# The devel image carries the compiler of the CUDA that torch 2.13.0 is built with, for what DeepSpeed builds at first use;
# torch brings its own CUDA libraries, and the host only provides the driver.
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
# hadolint ignore=DL3006
FROM ${BASE}

ARG UID=10001
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive LANG=C.UTF-8 PYTHONUNBUFFERED=1

# openssh-client: DeepSpeed's launcher starts other hosts through it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ git openssh-client python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid "${UID}" moe \
    && install -d -o moe -g moe /moe_train

USER ${UID}
WORKDIR /moe_train

# What is installed hardly changes: a change in the code alone leaves this layer as it is.
ARG PIP_EXTRA_INDEX_URL=
COPY --chown=moe:moe pyproject.toml constraints.txt hatch_build.py README.md LICENSE ./
COPY --chown=moe:moe scripts/setup.sh scripts/
COPY --chown=moe:moe moe_train/__init__.py moe_train/
RUN PIP_NO_CACHE_DIR=1 scripts/setup.sh

COPY --chown=moe:moe . .
RUN mkdir -p data-bin outputs && scripts/setup.sh

ENV PATH=/moe_train/.venv/bin:$PATH
CMD ["moe-train", "--help"]
