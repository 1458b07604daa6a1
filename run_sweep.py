"""``python run_sweep.py [CONFIG.yaml]``: sweeps the kernels, writes tables and plots, names the best block sizes."""

from sweeps.cli import run_main

if __name__ == "__main__":
    run_main()
