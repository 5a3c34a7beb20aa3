"""Runs an installed launch file as "ros2 launch" does, without needing ros2launch: runner.py FILE [name:=value …]."""

from __future__ import annotations

import sys

from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import AnyLaunchDescriptionSource

path, arguments = sys.argv[1], [argument.split(":=", 1) for argument in sys.argv[2:]]
service = LaunchService(argv=sys.argv[2:])
include = IncludeLaunchDescription(AnyLaunchDescriptionSource(path), launch_arguments=[tuple(a) for a in arguments])
service.include_launch_description(LaunchDescription([include]))
sys.exit(service.run())
