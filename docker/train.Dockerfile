# Training on NVIDIA GPUs. From the repository's root:
#   docker build -f docker/train.Dockerfile -t hf-poolformer-train .
#   docker run --rm --gpus all --ipc host -v "$PWD:/workspace" hf-poolformer-train train --train_dir photos --output_dir outputs/pets
# torch's wheels bring CUDA with them, so that the base need not; the host needs the driver and NVIDIA's container
# toolkit.
FROM python:3.13-slim-bookworm

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# Triton compiles the kernels' launchers with a C compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 trainer

# The extras, separated by commas.
ARG EXTRAS=train,dense,lora
COPY . /src
RUN pip install -c /src/constraints.txt "/src[$EXTRAS]"

# Whose files are written into /workspace: docker run --user "$(id -u):$(id -g)" makes them yours. That user has no
# name and no home, and torch asks for both.
ENV HF_HOME=/workspace/.cache/huggingface \
    HOME=/tmp \
    LOGNAME=trainer
USER 1000
WORKDIR /workspace
ENTRYPOINT ["hf-poolformer"]
CMD ["--help"]
