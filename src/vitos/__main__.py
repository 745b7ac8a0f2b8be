"""`python -m vitos` is `vitos`."""

from vitos.cli.main import main

if __name__ == "__main__":
    main()
