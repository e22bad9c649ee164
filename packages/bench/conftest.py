"""Keeps pytest's search for doctests from importing the one module that needs torch."""

collect_ignore = ["src/bench/peers/pytorch.py"]
