"""Keeps pytest's search for doctests from what needs the peers' packages, and from a second command line's flags."""

collect_ignore = [
    "src/bench/peers/pytorch.py",
    "src/bench/peers/ctranslate.py",
    "src/bench/peers/onnx.py",
    "src/bench/demo.py",
]
