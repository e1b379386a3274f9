# d2v for NVIDIA GPUs. From the top of the repository, where a GPU is not needed:
#     docker build -f packaging/cuda.Dockerfile -t d2v-cuda .
#     docker run --rm --gpus all --ipc=host -v "$PWD:/work" d2v-cuda pretrain vision-small --data.path images --run.dir run
# ARCHS: for example "90-real" for H100 and H200 alone, a third of the time.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/d2v
ENV PATH=/opt/d2v/bin:$PATH
ARG TORCH=2.13.0
RUN pip install --no-cache-dir "torch==$TORCH" --index-url https://download.pytorch.org/whl/cu130
WORKDIR /source
COPY requirements.txt .
RUN grep -E '^(setuptools|wheel|cmake|ninja|pybind11)==' requirements.txt > build.txt \
    && pip install --no-cache-dir -r build.txt
COPY . .
ARG ARCHS="80-real;90-real;100-real;120"
RUN D2V_BUILD_CUDA=1 D2V_REQUIRE_NATIVE=1 D2V_CUDA_ARCHS="$ARCHS" \
    pip install --no-cache-dir --no-build-isolation --constraint requirements.txt ".[train,attention]"

# torch's wheels bring the CUDA libraries; the driver is the host's.
FROM ubuntu:24.04
# Triton compiles its launchers with a C compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/d2v /opt/d2v
ENV PATH=/opt/d2v/bin:$PATH
RUN python -m d2v_kernels.info
WORKDIR /work
ENTRYPOINT ["d2v"]
