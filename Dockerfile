# The toolkit in a container: docs/guide/install.md has the commands.
# BASE: any Debian or Ubuntu with Python 3.10 or newer. For GPUs use an image of NVIDIA's and an empty TORCH_INDEX: pip's
# own index contains PyTorch with CUDA.
ARG BASE=debian:bookworm-slim
FROM ${BASE}

ARG TORCH="torch==2.14.1 torchvision==0.29.1"
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The user in the container; it must be able to write to the folders that are mounted.
ARG UID=1000

ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
# TORCH contains several words. This large layer comes first, so that a change of the package does not rebuild it.
# hadolint ignore=SC2086,DL3013
RUN pip install ${TORCH} ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"}

WORKDIR /opt/spec_mmdet
COPY . .
# hadolint ignore=DL3013
RUN pip install -e '.[mmdet]' \
    && pip uninstall --yes opencv-python \
    && pip install --force-reinstall --no-deps opencv-python-headless

# Ubuntu's images already have a user 1000, hence --non-unique.
RUN useradd --non-unique --no-log-init --uid "${UID}" --create-home spec && install --directory --owner=spec /work
USER ${UID}
WORKDIR /work
CMD ["spec-mmdet", "--help"]
