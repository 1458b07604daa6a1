"""Commands beside the sweeps: ``python -m sweeps repeat``, ``agreement`` and ``hosttime``."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from flash_sink_attn.devices import gpu_slug
from sweeps.console import make_console
from sweeps.environment import environment
from sweeps.repeat import markdown as repeat_markdown
from sweeps.repeat_runs import RepeatError, begin, go_on
from sweeps.runner import RunError
from sweeps.specfile import SpecError, load_spec
from sweeps.store import StoreError, new_run_dir

BAD_RUN, BAD_CONFIG, WRONG_CARD, INTERRUPTED = 1, 2, 3, 130
RESULTS = Path("results")


def add_commands(app: typer.Typer) -> None:
    """Adds them to ``python -m sweeps``."""
    app.command()(repeat)
    app.command()(agreement)
    app.command()(hosttime)


def repeat(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG.yaml", help="The sweep to repeat.")] = None,
    times: Annotated[int, typer.Option(metavar="N", help="How often to run it.")] = 3,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default results/<gpu>/<utc>-repeat-<name>.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with the repetition in DIR.")] = None,
    any_gpu: Annotated[bool, typer.Option("--any-gpu", help="Run a config on a card it is not made for.")] = False,
) -> None:
    """Run a sweep several times: how often the winners agree, and what a wrong pick costs."""
    if (config is None) == (resume is None):
        _fail(BAD_CONFIG, "expected either CONFIG.yaml or --resume DIR")
    gpu = environment()["gpu"]
    try:
        folder = resume
        if config is not None:
            spec = load_spec(config)
            refusal = None if any_gpu else spec.device.refusal(gpu)
            if refusal:
                _fail(WRONG_CARD, f"{refusal}. --any-gpu runs it all the same.")
            folder = out or new_run_dir(RESULTS, gpu_slug(gpu), f"repeat-{spec.name}")
            begin(folder, spec, times)
        assert folder is not None
        typer.echo(f"writing {folder}")
        found = go_on(folder, any_gpu=any_gpu, say=typer.echo)
    except (SpecError, ValueError) as error:
        _fail(BAD_CONFIG, str(error))
    except RepeatError as error:
        _fail(error.code, f"{error}\ngo on with: python -m sweeps repeat --resume {folder}")
    except KeyboardInterrupt:
        _fail(INTERRUPTED, f"interrupted; go on with: python -m sweeps repeat --resume {folder}")
    except (StoreError, RunError, OSError) as error:
        _fail(BAD_RUN, f"{error}\ngo on with: python -m sweeps repeat --resume {folder}")
    make_console().print(repeat_markdown(found), markup=False, highlight=False, soft_wrap=True)
    typer.echo(f"{folder}: repeat.md, repeat.csv, repeat.json")


def agreement(
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default results/<gpu>/<utc>-agreement.")] = None,
    only: Annotated[str, typer.Option(metavar="GLOB", help="Only calls that match, such as '*gpt-oss*'.")] = "*",
    ncu: Annotated[bool, typer.Option("--ncu", help="Ask Nsight Compute as well; ncu must be on the PATH.")] = False,
    ncu_only: Annotated[str, typer.Option(metavar="GLOB", help="With --ncu: ask it about these calls alone.")] = "*",
) -> None:
    """Compare our device time with the hardware's own, on kernels from 15 us to 20 ms."""
    import torch

    from sweeps.agreement import Agreement, add_ncu, markdown, run_agreement, write_agreement
    from sweeps.measure import DeviceTimer
    from sweeps.subjects import SUBJECTS

    names = fnmatch.filter(SUBJECTS, only)
    if not names:
        _fail(BAD_CONFIG, f"--only: {only!r} matches none of {', '.join(SUBJECTS)}")
    if not torch.cuda.is_available():
        _fail(WRONG_CARD, "agreement: expected a CUDA device, this machine has none")
    if ncu and shutil.which("ncu") is None:
        _fail(BAD_CONFIG, "--ncu: expected ncu on the PATH, found none")
    env = environment()
    folder = out or new_run_dir(RESULTS, gpu_slug(env["gpu"]), "agreement")
    facts = {name: env[name] for name in ("gpu", "driver", "cuda", "torch", "triton")}
    device = torch.device("cuda", 0)

    timer = DeviceTimer(device)

    def keep(found: Sequence[Agreement]) -> None:
        write_agreement(folder, found, timer.zero_ms, facts)

    found = run_agreement(timer, device, names=names, keep=keep, say=typer.echo)
    if not found:
        _fail(BAD_RUN, "agreement: no call could be compared")
    if ncu:
        typer.echo("Nsight Compute")
        found = add_ncu(found, fnmatch.filter(names, ncu_only))
        keep(found)
    make_console().print(markdown(found, timer.zero_ms, facts), markup=False, highlight=False, soft_wrap=True)
    typer.echo(f"{folder}: agreement.md, agreement.csv")


def hosttime(
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default results/<gpu>/<utc>-hosttime.")] = None,
) -> None:
    """Measure what a call costs the host, forward and backward, fixed and variable length. Wants a quiet machine."""
    import torch

    from sweeps.hosttime import markdown, run_host_times, write_host_times

    if not torch.cuda.is_available():
        _fail(WRONG_CARD, "hosttime: expected a CUDA device, this machine has none")
    env = environment()
    folder = out or new_run_dir(RESULTS, gpu_slug(env["gpu"]), "hosttime")
    found = run_host_times(torch.device("cuda", 0), say=typer.echo)
    facts = {name: env[name] for name in ("gpu", "driver", "cuda", "torch", "triton", "python", "cpu_count")}
    write_host_times(folder, found, facts)
    make_console().print(markdown(found, facts), markup=False, highlight=False, soft_wrap=True)
    typer.echo(f"{folder}: hosttime.md, hosttime.csv")


def _fail(code: int, message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)
