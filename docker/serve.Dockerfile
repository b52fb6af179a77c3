# A classifier over HTTP, on the CPU. From the repository's root:
#   docker build -f docker/serve.Dockerfile -t hf-poolformer-serve .
#   docker run --rm -p 8000:8000 -v "$PWD/outputs/pets:/model:ro" hf-poolformer-serve
# For an export: docker build --build-arg RUNTIME=onnxruntime ..., or RUNTIME=openvino.
FROM python:3.13-slim-bookworm AS build
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM python:3.13-slim-bookworm
ENV PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    HF_HUB_OFFLINE=1 \
    HOME=/tmp

# PyTorch's own index has a build without CUDA, a tenth as large.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG RUNTIME=
COPY constraints.txt /tmp/constraints.txt
COPY --from=build /wheels /tmp/wheels
RUN pip install -c /tmp/constraints.txt --extra-index-url "$TORCH_INDEX" "$(echo /tmp/wheels/*.whl)[serve]" $RUNTIME

COPY examples/serve.py /app/serve.py
RUN useradd --no-create-home --uid 10001 server
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["python", "/app/serve.py"]
CMD ["/model", "--host", "0.0.0.0", "--port", "8000"]
