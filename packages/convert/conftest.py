"""Two modules here are command lines that refuse to be imported; pytest's search for doctests would try."""

collect_ignore = ["src/convert/export.py", "src/convert/verify.py"]
