"""Many random calls of the Hopper forward on one card: ``python -m tests.hopper_random --count 1000``.

See tests.random_calls.
"""

from __future__ import annotations

import sys

from tests.random_calls import main

if __name__ == "__main__":
    sys.exit(main("tests.hopper_cases", __doc__, (sys.executable, "-m", "tests.hopper_worker")))
