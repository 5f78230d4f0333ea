# The toolkit in a container: docs/guide/install.md has the commands.
# BASE is any Debian or Ubuntu with Python 3.10 or newer. NVIDIA's is for GPUs, with TORCH_INDEX empty: pip's own index
# has PyTorch with CUDA.
ARG BASE=debian:bookworm-slim
FROM ${BASE}

ARG TORCH="torch==2.14.1 torchvision==0.29.1"
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Of the user in the container, who has to be able to write into the folders of yours that it is given.
ARG UID=1000

ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
# TORCH is several words. It is the large layer, and first, so that a change of the package leaves it as it is.
# hadolint ignore=SC2086,DL3013
RUN pip install ${TORCH} ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"}

WORKDIR /opt/spec_mmdet
COPY . .
# hadolint ignore=DL3013
RUN pip install -e '.[mmdet]' \
    && pip uninstall --yes opencv-python \
    && pip install --force-reinstall --no-deps opencv-python-headless

# Ubuntu's images have a user 1000 already.
RUN useradd --non-unique --no-log-init --uid "${UID}" --create-home spec && install --directory --owner=spec /work
USER ${UID}
WORKDIR /work
CMD ["spec-mmdet", "--help"]
