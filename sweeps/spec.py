"""What a sweep is: the validated, frozen form of configs/*.yaml.

Every key is documented in the class of its section. A group repeats ``shapes``, ``passes`` or ``tunables`` only where
it differs from the top level. Reading a file, ``--set`` and the wording of errors are in :mod:`sweeps.specfile`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    StrictBool,
    create_model,
    field_validator,
    model_validator,
)

from flash_sink_attn.config import CONFIG_CLASS, HopperBwdConfig, HopperFwdConfig, Kernel, TileConfig
from flash_sink_attn.devices import gpu_slug
from sweeps.devices import Card, find_card
from sweeps.fields import Booleans, Heads, Integers, Many, ModelName, Section, Varlen, Window, nearest, same_or_pair
from sweeps.sampling import FinalSampling, Sampling

DEFAULT_ARCH = 90

Pass = Literal["fwd", "bwd_dq", "bwd_dkdv", "bwd", "fwd_bwd"]


class Device(Section):
    """The card a sweep is made for. ``device: H100`` is short for ``device: {name: H100}``.

    Attributes:
        name: short name of a card ("H100", "H200", "H20"), or its name as the driver gives it; "cuda" = any CUDA card;
            null (default) = any machine, the interpreter on one without a GPU.
        arch: compute capability to compile for without that card, major * 10 + minor; default the card's, else 90.
        measured: false says that nobody has run this config on its card yet; default true.
    """

    name: str | None = None
    arch: PositiveInt | None = None
    measured: StrictBool = True

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: Any) -> Any:
        return {"name": data} if data is None or isinstance(data, str) else data

    @property
    def card(self) -> Card | None:
        """What is known of the card named, None for "cuda", null and cards not in the table."""
        return find_card(self.name) if self.name and self.name != "cuda" else None

    @property
    def compile_arch(self) -> int:
        return self.arch or (self.card.arch if self.card else DEFAULT_ARCH)

    def refusal(self, gpu: str) -> str | None:
        """Why the machine with this GPU ("cpu" = none) is not the one the config is made for, or None."""
        if self.name is None:
            return None
        here = "this machine has no CUDA device" if gpu == "cpu" else f"this machine has a {gpu}"
        if self.name == "cuda":
            return f"device.name: expected a CUDA card, {here}" if gpu == "cpu" else None
        wanted = self.card.slug if self.card else gpu_slug(self.name)
        if gpu != "cpu" and gpu_slug(gpu) == wanted:
            return None
        return f"device.name: the config is made for {self.name}, {here}"


class Shapes(Section):
    """A grid of workloads: models (or heads x head_dim) x dtype x window x (seqlen x batch, and varlen batches).

    A single value may stand for a list of one. Lengths are in tokens.

    Attributes:
        model: names of presets, which give heads, head dims and windows: gpt-oss, qwen2.5-7b, llama-70b, granite,
            mimo-v2-flash.
        heads: pairs [query heads, key heads], combined with every head_dim.
        head_dim: one number, or [query and key head dim, value head dim].
        seqlen: one number, or [queries, keys]; fewer queries than keys are aligned to the end.
        batch: sequences of equal length; default 1.
        window: keys a query sees, its own counted; null = causal only. Default: the varlen batch's own, else the
            model's own, else null.
        dtype: bfloat16 (default), float16.
        varlen: packed batches by name (upstream, skewed, even, one_long), or {name: ..., seqlens: [...]}.
        sinks: whether there are sinks; default true.
    """

    model: Annotated[tuple[ModelName, ...] | None, Many] = None
    heads: tuple[Heads, ...] | None = None
    head_dim: Annotated[tuple[Annotated[tuple[int, int], same_or_pair(
        "a dimension or [query and key dimension, value dimension]")], ...] | None, Many] = None
    seqlen: Annotated[tuple[Annotated[tuple[int, int], same_or_pair(
        "a number of tokens >= 1 or [queries, keys]")], ...] | None, Many] = None
    batch: Annotated[tuple[Annotated[int, Field(strict=True, ge=1)], ...] | None, Many] = None
    window: Annotated[tuple[Window, ...] | None, Many] = None
    dtype: Annotated[tuple[Literal["bfloat16", "float16"], ...] | None, Many] = None
    varlen: Annotated[tuple[Varlen, ...] | None, Many] = None
    sinks: Annotated[tuple[StrictBool, ...] | None, Many] = None

    def inherit(self, parent: Shapes) -> Shapes:
        """This grid with what it leaves out taken from ``parent``.

        Models and heads stand for each other, and so do seqlen and varlen: a grid that names one takes neither from
        its parent.
        """
        own = self.model_fields_set
        taken = parent.model_fields_set - own
        for chosen, other in (("model", {"heads", "head_dim"}), ("heads", {"model"}),
                              ("varlen", {"seqlen", "batch"}), ("seqlen", {"varlen"})):
            if chosen in own:
                taken -= other
        fields = {name: getattr(self if name in own else parent, name) for name in own | taken}
        return Shapes.model_construct(_fields_set=set(fields), **(dict.fromkeys(Shapes.model_fields) | fields))


class _Tiles(Section):
    """Tiles of one kernel: the product of its lists. A single value may stand for a list of one.

    The fields and what they default to are those of the kernel's class in ``flash_sink_attn.config``, where they are
    explained.
    """

    def configs(self) -> Iterator[dict[str, Any]]:
        """Every combination, with all fields by name."""
        names = list(type(self).model_fields)
        for values in itertools.product(*(getattr(self, name) for name in names)):
            yield dict(zip(names, values, strict=True))


_LISTS: dict[str, Any] = {
    "bool": Booleans, "int": Integers,
    "int | None": Annotated[tuple[Annotated[int | None, Field(strict=True)], ...], Many],
}
_COUNTS_FROM_0 = Annotated[tuple[Annotated[int, Field(strict=True, ge=0)], ...], Many]


def _tiles_of(config: type[Any]) -> type[_Tiles]:
    """The section of the grids of a kernel with this class of configurations."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        required = field.default is dataclasses.MISSING
        kind = _LISTS[str(field.type)]
        if str(field.type) == "int" and field.default == 0:
            kind = _COUNTS_FROM_0
        fields[field.name] = (kind, ... if required else (field.default,))
    return create_model(config.__name__, __base__=_Tiles, **fields)


def _grids(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


_SECTIONS = {config: _tiles_of(config) for config in (TileConfig, HopperFwdConfig, HopperBwdConfig)}
# The section of each kernel's grids.
TILES: dict[Kernel, type[_Tiles]] = {kernel: _SECTIONS[config] for kernel, config in CONFIG_CLASS.items()}


def _default_or_grids(value: Any) -> Any:
    return None if value == "default" else _grids(value)


if TYPE_CHECKING:
    PortableGrids: TypeAlias = tuple[_Tiles, ...] | None
    HopperFwdGrids: TypeAlias = PortableGrids
    HopperBwdGrids: TypeAlias = PortableGrids
else:
    PortableGrids, HopperFwdGrids, HopperBwdGrids = (
        Annotated[tuple[_SECTIONS[config], ...] | None, BeforeValidator(_default_or_grids)]
        for config in (TileConfig, HopperFwdConfig, HopperBwdConfig))


class Tunables(Section):
    """Tiles to try for our kernels, per kernel: the portable ones (implementation ``triton``) and the Hopper ones
    (``hopper``).

    Attributes:
        fwd, bwd_dq, bwd_dkdv, hopper_fwd, hopper_bwd: a grid, a list of grids (one with single values is one tile), or
            "default" (which is the default): the implementation's own choice for each case.
        combine: the portable backward as a whole is timed with each of the best ``combine`` tiles of bwd_dq together
            with each of the best ``combine`` of bwd_dkdv; default 2.
    """

    fwd: PortableGrids = None
    bwd_dq: PortableGrids = None
    bwd_dkdv: PortableGrids = None
    hopper_fwd: HopperFwdGrids = None
    hopper_bwd: HopperBwdGrids = None
    combine: PositiveInt = 2

    def inherit(self, parent: Tunables) -> Tunables:
        """These tiles, with the kernels left out taken from ``parent``."""
        own = self.model_fields_set
        fields = {name: getattr(self if name in own else parent, name) for name in Tunables.model_fields}
        return Tunables.model_construct(**fields)


OwnGrids = Annotated[tuple[dict[str, Annotated[tuple[Any, ...], Many]], ...], BeforeValidator(_grids)]


class ImplementationSpec(Section):
    """One kernel or peer of the run, under the name of the impl column.

    Attributes:
        use: ``package.module:NAME``, for one that is not built in and is to have a name of its own.
        path: where its source lies, for those that are not installed (upstream, gptoss_triton).
        options: whatever else it takes.
        passes: only these of the sweep's passes; default all.
        tunables: its configurations per pass, each a list of grids over names of its own; default its own choice.
    """

    use: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    path: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    passes: tuple[Pass, ...] | None = None
    tunables: dict[Pass, OwnGrids] = Field(default_factory=dict)

    def all_options(self) -> dict[str, Any]:
        """What is handed to the implementation's maker."""
        return self.options | ({} if self.path is None else {"path": self.path})

    def grids(self, pass_: str) -> list[dict[str, Any]] | None:
        """Its configurations of a pass, None = its own choice."""
        if pass_ not in self.tunables:
            return None
        return [dict(zip(grid, values, strict=True))
                for grid in self.tunables[pass_] for values in itertools.product(*grid.values())]


class Finals(Section, FinalSampling):  # type: ignore[misc]  # frozen by model_config, which mypy does not see
    """Who is timed again, in the same moments as its rivals, and until when: :class:`sweeps.sampling.FinalSampling`.

    Attributes:
        enabled: default null = where there is a GPU. Without finals the first pass decides.
        within: candidates of ours go on when their interval overlaps the fastest one's, or their time is at most this
            share above it; default 0.02.
        max_entrants: never more per case, the fastest and the untuned default first; default 6.
    """

    enabled: StrictBool | None = None
    within: NonNegativeFloat = 0.02
    max_entrants: Annotated[int, Field(ge=2)] = 6


class Timing(Section, Sampling):  # type: ignore[misc]  # as above
    """How long to measure: the fields of :class:`sweeps.sampling.Sampling`, and these.

    Attributes:
        compile_timeout_s: limit for building one configuration, seconds; default 120. A peer that builds on its first
            call has the same limit for that call.
        measure_timeout_s: limit for each of checking and timing one trial, seconds; default 120.
        finals: how the best candidates are told apart.
    """

    compile_timeout_s: PositiveFloat = 120.0
    measure_timeout_s: PositiveFloat = 120.0
    finals: Finals = Finals()


class Gate(Section):
    """Correct before timed.

    Attributes:
        enabled: false times whatever comes out and leaves rel_err_* empty; default true.
    """

    enabled: StrictBool = True


class Group(Section):
    """Some of the sweep's workloads with passes and tiles of their own; whatever is left out is the top level's.

    Attributes:
        shapes, passes, tunables: as on the top level.
        implementations: names out of the top level's; default all of them.
    """

    shapes: Shapes = Shapes()
    passes: Annotated[tuple[Pass, ...], Many] | None = None
    tunables: Tunables = Tunables()
    implementations: tuple[str, ...] | None = None


class SweepSpec(Section):
    """A whole sweep.

    Attributes:
        name: part of the run directory's name; letters, digits, hyphens, dots and underscores.
        description: printed when it starts and on top of its report.
        device: the card it is made for.
        seed: of the random inputs; default 0.
        passes: of fwd, bwd (default both), fwd_bwd, and the parts bwd_dq and bwd_dkdv. bwd includes the parts of a
            kernel that has them.
        implementations: kernels and peers, a list of names, or names with their settings; default triton alone.
        shapes, tunables: of every group that does not say otherwise.
        groups: parts of the sweep by name; without any, the top level is the only one.
        timing, gate: how to measure and check.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    device: Device = Device()
    seed: Annotated[int, Field(strict=True, ge=0)] = 0
    passes: Annotated[tuple[Pass, ...], Many] = ("fwd", "bwd")
    implementations: dict[str, ImplementationSpec] = Field(default_factory=lambda: {"triton": ImplementationSpec()})
    shapes: Shapes = Shapes()
    tunables: Tunables = Tunables()
    groups: dict[str, Group] = Field(default_factory=dict)
    timing: Timing = Timing()
    gate: Gate = Gate()

    @field_validator("implementations", mode="before")
    @classmethod
    def _names_or_mapping(cls, value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return {name: {} for name in value}
        return {k: {} if v is None else v for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("groups", mode="before")
    @classmethod
    def _empty_group(cls, value: Any) -> Any:
        return {k: {} if v is None else v for k, v in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _complete(self) -> SweepSpec:
        if not self.implementations:
            raise ValueError("implementations: expected at least one, got none")
        for name, group in self.resolved_groups().items():
            where = f"groups.{name}.shapes" if self.groups else "shapes"
            if not group.shapes.model and not (group.shapes.heads and group.shapes.head_dim):
                raise ValueError(f"{where}: expected model, or heads and head_dim, got neither")
            if not group.shapes.seqlen and not group.shapes.varlen:
                raise ValueError(f"{where}: expected seqlen or varlen, got neither")
            for unknown in set(group.implementations or ()) - set(self.implementations):
                raise ValueError(f"groups.{name}.implementations: {unknown!r} is not among the sweep's implementations"
                                 f" ({', '.join(self.implementations)}){nearest(unknown, list(self.implementations))}")
        return self

    def resolved_groups(self) -> dict[str, Group]:
        """The groups with all that they inherit filled in; one called like the sweep when there are none."""
        return {name: Group.model_construct(
            shapes=group.shapes.inherit(self.shapes), passes=group.passes or self.passes,
            tunables=group.tunables.inherit(self.tunables),
            implementations=tuple(self.implementations) if group.implementations is None else group.implementations)
            for name, group in (self.groups or {self.name: Group()}).items()}
