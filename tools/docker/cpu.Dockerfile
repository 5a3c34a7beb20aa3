# The node on a CPU: docker build -f tools/docker/cpu.Dockerfile --build-arg ROS_DISTRO=jazzy -t edgellm_ros:jazzy .
ARG ROS_DISTRO=jazzy
FROM ros:${ROS_DISTRO}-ros-base
ARG ROS_DISTRO
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-pip python3-venv python3-colcon-common-extensions \
        "ros-${ROS_DISTRO}-diagnostic-updater" "ros-${ROS_DISTRO}-bond" \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /ws
COPY requirements.txt src/edgellm_ros/requirements.txt
# An environment on top of ROS's Python: Ubuntu 24.04 lets pip change nothing else (PEP 668).
RUN python3 -m venv --system-site-packages /ws/venv \
    && /ws/venv/bin/pip install --no-cache-dir -r src/edgellm_ros/requirements.txt \
    && touch /ws/venv/COLCON_IGNORE
ENV PATH=/ws/venv/bin:$PATH
COPY . src/edgellm_ros
RUN . "/opt/ros/${ROS_DISTRO}/setup.bash" \
    && colcon build --packages-select edgellm_ros --cmake-args -DBUILD_TESTING=OFF
COPY tools/docker/entrypoint.sh /entrypoint.sh
RUN useradd --create-home --uid 1001 robot && chown robot /ws
USER 1001
ENTRYPOINT ["/entrypoint.sh"]
CMD ["ros2", "launch", "edgellm_ros", "llm.launch.py"]
