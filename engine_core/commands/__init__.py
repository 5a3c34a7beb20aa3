"""The commands of ``edgellm``: one module each, whose ``add(commands)`` adds its parser and sets ``run``.

They are imported for every ``edgellm --help``: what is heavy is imported inside ``run``.
"""
