"""`python -m moefication_cli`, also the entry for torchrun."""

from moefication_cli.cli.app import main

if __name__ == "__main__":
    main()
