"""`python -m vitos` is `vitos`."""

from vitos.cli import main

if __name__ == "__main__":
    main()
