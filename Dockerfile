# vitos for serving and training. The image holds no model but the embedded ones.
#
#   docker build -t vitos .                                    the PyTorch build of your package index: on Linux, CUDA
#   docker build -t vitos:cpu --build-arg TORCH="torch==2.13.0 --index-url <the index of CPU builds>" .
#
#   docker run --rm -p 8000:8000 -e VITOS_TOKEN=a-secret vitos                       serve the embedded model
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" vitos train mine.yaml   train in the current folder
#
# A CUDA build brings its own CUDA libraries; the machine needs the driver and the NVIDIA container toolkit.
FROM python:3.12-slim AS build
ARG TORCH="torch==2.13.0"
ARG EXTRAS="lora,dicom,nifti,report,serve"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# PyTorch first, and alone: a change of vitos does not install it again. Its words are split on purpose.
# hadolint ignore=SC2086
RUN python -m venv /opt/vitos && /opt/vitos/bin/pip install ${TORCH}
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY recipes recipes
COPY src src
RUN /opt/vitos/bin/pip install ".[${EXTRAS}]"

FROM python:3.12-slim
RUN useradd --create-home --uid 1000 vitos && install --directory --owner vitos /data
COPY --from=build /opt/vitos /opt/vitos
ENV PATH=/opt/vitos/bin:$PATH HF_HOME=/data/huggingface PYTHONUNBUFFERED=1
USER 1000
WORKDIR /data
EXPOSE 8000
ENTRYPOINT ["vitos"]
CMD ["serve", "nano", "--host", "0.0.0.0"]
