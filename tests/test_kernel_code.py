"""The hash that says whether a tuned entry was measured on these kernels."""

from __future__ import annotations

from flash_sink_attn.kernel_code import code_text, kernel_code_hash

SOURCE = '''"""A module."""
import triton

def kernel(X, BLOCK: int):
    """What it does."""
    x = X + 1  # why
    return x
'''


def test_comments_docstrings_and_line_breaks_play_no_part():
    other = 'import triton\n\n\ndef kernel(\n    X, BLOCK: int\n):\n    x = (X +\n         1)\n    return x\n'
    assert code_text(SOURCE) == code_text(other)


def test_the_code_does():
    for a, b in (("X + 1", "X + 2"), ("X + 1", "X - 1"), ("BLOCK: int", "BLOCK"), ("return x", "return X"),
                 ("X + 1", "X + 1.0"), ("kernel(", "other(")):
        assert code_text(SOURCE) != code_text(SOURCE.replace(a, b)), (a, b)
    assert code_text('"""doc"""\nX = "doc"') != code_text('"""doc"""\nX = "dog"')


def test_the_packages_own():
    assert kernel_code_hash() == kernel_code_hash() and len(kernel_code_hash()) == 12
