"""Keeps pytest's search for doctests from importing what needs the peers' packages."""

collect_ignore = ["src/bench/peers/pytorch.py", "src/bench/peers/ctranslate.py"]
