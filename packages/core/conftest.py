"""A command line's flags can be defined once in a process; pytest's search for doctests imports core.quality."""

collect_ignore = ["src/core/generate.py"]
