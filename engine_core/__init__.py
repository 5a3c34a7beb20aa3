"""The inference core of edgellm_ros: usable as a library and on the command line, without ROS."""

__version__ = "0.1.0"
