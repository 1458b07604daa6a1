"""The answer in the terminal: readable at 80 columns, a case per line."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sweeps.select import select
from sweeps.terminal_answer import answer_blocks
from tests import synthetic
from tests.synthetic import case, row, tile


@pytest.fixture(scope="module")
def lines():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(answer_blocks(select(synthetic.run_rows())))
    return console.export_text().splitlines()


def test_no_line_is_wider_than_the_terminal_and_no_configuration_is_broken(lines):
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert any("gpt-oss 64/8 x 64, window 128, bf16" in line for line in lines)
    first = next(line for line in lines if line.startswith("fwd") and "1024" in line)
    assert "64x64 w4 s3" in first and first.count("x") >= 4


def test_a_backward_takes_a_line_per_kernel_and_parts_are_left_out(lines):
    at = next(i for i, line in enumerate(lines) if line.startswith("bwd "))
    assert "dq 64x64 w4 s3" in lines[at] and lines[at + 1].strip() == "dkdv 64x64 w4 s3"
    assert not any(line.startswith(("bwd_dq", "bwd_dkdv")) for line in lines)


def test_a_case_without_a_winner_says_why():
    c = case("gpt-oss", "fwd", 4096)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(answer_blocks(select([row(c, config=tile(64, 64), status="crashed"),
                                        row(c, config=tile(64, 32), status="crashed"), row(c, "eager", ms=1.0)])))
    assert "none: 2 crashed" in console.export_text()
