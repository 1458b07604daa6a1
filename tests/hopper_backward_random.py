"""Many random calls of the Hopper forward and backward on one card: ``python -m tests.hopper_backward_random``.

See tests.random_calls.
"""

from __future__ import annotations

import sys

from tests.random_calls import main

if __name__ == "__main__":
    sys.exit(main("tests.hopper_backward_cases", __doc__, (sys.executable, "-m", "tests.hopper_backward_cases")))
