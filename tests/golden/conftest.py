"""The recipes beside the files are not tests, and what they import is not installed with the project."""

collect_ignore_glob = ["make_*.py"]
