# CPU:  docker build -t seqsetvae .
# CUDA: docker build -t seqsetvae --build-arg BASE=pytorch/pytorch:VERSION-cudaVERSION-cudnn9-runtime --build-arg TORCH=torch .
#       (any image with Python 3.11 or later; where it has PyTorch already, TORCH=torch keeps that build)
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

ARG TORCH=torch==2.13.0
ARG EXTRAS=remote
ENV PYTHONUNBUFFERED=1

WORKDIR /source
COPY pyproject.toml README.md LICENSE preprocess.py seqsetvae.py train.py ./
COPY pipeline pipeline
COPY model model
COPY training training
# The project has no version to pin, and of its requirements the newest will do.
# hadolint ignore=DL3013
RUN python3 -m pip install --no-cache-dir "${TORCH}" && python3 -m pip install --no-cache-dir ".[${EXTRAS}]"

# Patients' data belong to whoever starts the container: docker run --user "$(id -u):$(id -g)" -v "$PWD:/work" seqsetvae ...
RUN useradd --create-home --uid 10001 seqsetvae
USER 10001
WORKDIR /work
CMD ["seqsetvae-train", "--help"]
