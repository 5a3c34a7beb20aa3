#!/usr/bin/env bash
# Runs a command with ROS and the package sourced.
set -eo pipefail
# shellcheck source=/dev/null
. "/opt/ros/$ROS_DISTRO/setup.bash"
# shellcheck source=/dev/null
. /ws/install/setup.bash
exec "$@"
