# d2v for CPUs. From the top of the repository:
#     docker build -f packaging/cpu.Dockerfile -t d2v .
#     docker run --rm -v "$PWD:/work" d2v pretrain vision-tiny --data.path images --run.dir run
FROM python:3.11-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/d2v
ENV PATH=/opt/d2v/bin:$PATH
ARG TORCH=2.13.0
RUN pip install --no-cache-dir "torch==$TORCH" --index-url https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY requirements.txt .
RUN grep -E '^(setuptools|wheel|cmake|ninja|pybind11)==' requirements.txt > build.txt \
    && pip install --no-cache-dir -r build.txt
COPY . .
RUN D2V_BUILD_CUDA=0 D2V_REQUIRE_NATIVE=1 \
    pip install --no-cache-dir --no-build-isolation --constraint requirements.txt ".[train]"

FROM python:3.11-slim-bookworm
COPY --from=build /opt/d2v /opt/d2v
ENV PATH=/opt/d2v/bin:$PATH
RUN python -m d2v_kernels.info
WORKDIR /work
ENTRYPOINT ["d2v"]
