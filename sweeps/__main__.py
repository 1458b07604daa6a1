"""``python -m sweeps``: run, doctor, report, export."""

from sweeps.cli import main

if __name__ == "__main__":
    main()
