"""`python -m nbdserve` is `nbdserve`."""

from nbdserve.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
