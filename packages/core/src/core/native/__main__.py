"""`python -m core.native`: compiles the kernels for this machine now."""

from core.native import build

if __name__ == "__main__":
    build.main()
