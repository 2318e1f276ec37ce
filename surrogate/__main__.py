"""`python -m surrogate` is the command line."""

from surrogate.cli import main

if __name__ == "__main__":
    main()
