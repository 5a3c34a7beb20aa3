"""Sphinx's configuration of these pages for rosdoc2 (``rosdoc2.yaml``), which adds its own to it."""

project = "edgellm_ros"
author = "The edgellm_ros authors"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_heading_anchors = 3  # as GitHub has them
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository, which are no pages
