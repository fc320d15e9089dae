# OPTIMA on a CUDA machine with the optional accelerators. These steps have not been built: no machine with Docker and a GPU was at hand.
#   docker build -t optima . && docker run --gpus all optima doctor --check
FROM nvidia/cuda:13.0.0-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends git ninja-build python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/optima
ENV PATH=/opt/optima/bin:$PATH
RUN pip install --no-cache-dir 'torch>=2.10,<2.14' --index-url https://download.pytorch.org/whl/cu130 && pip install --no-cache-dir numpy packaging setuptools wheel
# flash-attn builds against the torch that is there.
RUN pip install --no-cache-dir --no-build-isolation 'flash-attn>=2.7' && pip install --no-cache-dir 'nvidia-dali-cuda130>=2.0'
# apex is built from source: its package on PyPI is another one.
RUN git clone --depth 1 https://github.com/NVIDIA/apex /tmp/apex \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-build-isolation /tmp/apex && rm -rf /tmp/apex
COPY . /optima
RUN pip install --no-cache-dir '/optima[triton,text,onnx,track,hf]'
WORKDIR /work
ENTRYPOINT ["optima"]
