# The node on an NVIDIA GPU, on top of the image of cpu.Dockerfile:
#   PC:              docker build -f tools/docker/cuda.Dockerfile --build-arg BASE=edgellm_ros:jazzy --build-arg CUDA=13 .
#   JetPack 6 (L4T): --build-arg BASE=edgellm_ros:humble --build-arg CUDA=12
# docker run --gpus all …; on a Jetson --runtime nvidia. The kernels are compiled at the first configure, into
# ~/.cache/edgellm_ros/kernels: mount a volume there to keep them.
ARG BASE=edgellm_ros:jazzy
FROM ${BASE}
ARG CUDA=13
USER 0
RUN if [ "${CUDA}" = 13 ]; then suffix=; else suffix="-cu${CUDA}"; fi \
    && /ws/venv/bin/pip install --no-cache-dir \
        "cuda-bindings==${CUDA}.*" "nvidia-cuda-nvrtc${suffix}" "nvidia-cublas${suffix}"
USER 1001
