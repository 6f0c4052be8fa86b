"""ScaleLong in one call: finds the long skips of a network, scales them, and folds constants into what reads them.

    >>> model = hw.apply(model, hw.ScaleLong("cs", kappa=0.7))      # or "ls", "sqrt2", a list of constants
    >>> model = hw.apply(model.eval(), FoldLongSkips())             # constants cost nothing at inference

The equations and the paper (arXiv 2310.13545) stand in :mod:`headway.residual.long_skip`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from headway.checkpoints import record
from headway.residual.long_skip import AXES, INITS, MODES, LongSkips, skip_scales
from headway.residual.long_skip_fold import folded
from headway.residual.long_skip_hosts import ScaledHost, SetScaling
from headway.residual.long_skip_sites import Host, Network, find_networks
from headway.surgery import Edit, Site, Swap, Technique, apply, like

NAME = "long_skips"


@dataclass(frozen=True)
class ScaleLong(Technique):
    """Scales the long skips of a UNet-shaped network; its weights, names and classes stay as they are.

    Finds them in headway's own :class:`LongSkips`; in diffusers' ``UNet2DModel``, ``UNet2DConditionModel`` and kin (every entry of
    the up blocks' residual tuples is one); in U-ViT and other decoders whose blocks take an argument ``skip`` or
    ``skip_connection``; in segmentation-models' UNets; and, traced by torch.fx, in any network that concatenates or adds them. The
    network owns the new module ``long_skips``, and ``hw.plan`` lists every skip with its number, encoder, decoder and factor.

    Args:
        mode: "cs" (``kappa ** (i - 1)``, i = 1 the outermost), "sqrt2", "none", "ls" (gates read from the skips), or the constants
            themselves, outermost first.
        kappa: of "cs", in (0, 1].
        share: under "ls", one gate for all skips with the same number of tokens or channels; False gives each its own.
        features: under "ls", how many tokens or channels each skip has, outermost first (one number for all); told by diffusers',
            U-ViT's and segmentation-models' networks, measured on ``example_inputs`` for others.
        axis: "token" or "channel" gates; tokens for sequences (B, T, D), channels for (B, C, *space) by default.
        reduction, init: of the gates, see :class:`SkipGate`; ``init="one"`` for a trained network.
        min_span: how many modules deeper the decoder's feature must lie than the skip for a traced network: 2 for concatenations
            and 8 for sums by default.
        example_inputs: what the model is called with: a tuple, a mapping, or one tensor. The skips are then those of one run.

    Raises:
        ValueError: kappa outside (0, 1], an unknown mode, a list of another length, features that are not known, a decoder block
            that runs several times, or long skips that are scaled already.
        NothingToChange: no long skip was found; the message lists what the model holds.

    Source: Huang et al., ScaleLong, NeurIPS 2023, arXiv 2310.13545.
    """

    looks_for: ClassVar[str] = (
        "long skips: up blocks with a residual tuple, decoder blocks with an argument skip, or concatenations and sums "
        "of a value with one computed much earlier (min_span)"
    )

    mode: Any = "cs"
    kappa: float = 0.7
    share: bool = True
    features: Any = None
    axis: str | None = None
    reduction: int = 16
    init: str = "half"
    min_span: int | None = None
    example_inputs: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("mode", "features"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.mode, str) and self.mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)} or a list of constants; {self.mode!r} was given")
        if self.axis not in (None, *AXES) or self.init not in INITS:
            raise ValueError(
                f"axis is one of {AXES} and init one of {INITS}; {self.axis!r} and {self.init!r} were given"
            )
        skip_scales(1, "cs", self.kappa)

    def label(self) -> str:
        return super().label() if self.example_inputs is None else replace(self, example_inputs=None).label()

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        if any(isinstance(module, ScaledHost) for module in model.modules()):
            raise ValueError(
                "the long skips of this model are scaled already; take that back with hw.undo(model) first"
            )
        allowed = {id(site.module) for site in sites}
        found: list[Edit] = []
        known: set[tuple[int, ...]] = set()
        for network in find_networks(model, self.min_span, self.example_inputs):
            edits = (
                self._native(model, network, allowed) if not network.hosts else self._hosted(model, network, allowed)
            )
            if edits and network.features:
                known.add(network.features)
            found += edits
        if not found:
            return []
        features = (
            next(iter(known)) if self.features is None and self.mode == "ls" and len(known) == 1 else self.features
        )
        return [*found, *record(model, replace(self, example_inputs=None, features=features), sites)]

    def _skips(self, network: Network) -> LongSkips:
        features: Any = self.features if self.features is not None else network.features
        if features is None and self.mode == "ls":
            raise ValueError(
                f'mode="ls" needs to know how many tokens or channels each of the {network.n} long skips of '
                f"{type(network.module).__name__} has; give example_inputs=..., or features=..."
            )
        axis = self.axis or network.axis
        return LongSkips(network.n, self.mode, self.kappa, self.share, features, self.reduction, axis, self.init)

    def _native(self, model: nn.Module, network: Network, allowed: set[int]) -> list[Edit]:
        if id(network.module) not in allowed:
            return []
        new = like(Site(network.module, network.name, None, model), self._skips(network))
        return [Swap(model, network.name, network.module, new)]

    def _hosted(self, model: nn.Module, network: Network, allowed: set[int]) -> list[Edit]:
        hosts = [host for host in network.hosts if id(host.module) in allowed]
        if not hosts:
            return []
        place = Site(nn.Identity().train(network.module.training), "", network.module, model)
        skips: Any = like(place, self._skips(network))
        found: list[Edit] = []
        for host in hosts:
            first, *others = sorted((i for i in host.at if i is not None), reverse=True)
            found.append(SetScaling(host, skips, _told(network, first, skips)))
            found += [_AlsoScaled(host.name, _told(network, i, skips)) for i in others]
        return [*found, Attach(network.module, NAME, skips, network.name)]


def _told(network: Network, i: int, skips: LongSkips) -> tuple[str, str]:
    source = network.encoders[i - 1] or "the encoder"
    if skips.mode == "ls":
        gate: Any = skips.gates[skips._which[i - 1]]
        return f"skip {i} of {network.n} from {source}", f"gated by {gate.features} {gate.axis}s"
    return f"skip {i} of {network.n} from {source}", f"times {skips.scales[i - 1]:.4g}"


class _AlsoScaled(Edit):
    """A further skip of the same block, for the plan."""

    def __init__(self, name: str, told: tuple[str, str]) -> None:
        self.name, self.told = name, told

    def do(self) -> None:
        pass

    def undo(self) -> None:
        pass

    def describe(self) -> tuple[str, str]:
        return self.told


class Attach(Edit):
    """Registers a module under a new name in its owner, or takes it away (``module`` None)."""

    def __init__(self, owner: nn.Module, attribute: str, module: nn.Module | None, owner_name: str) -> None:
        self.owner, self.attribute, self.new = owner, attribute, module
        self.old = owner._modules.get(attribute)
        self.name = f"{owner_name}.{attribute}".lstrip(".")
        if module is not None and hasattr(owner, attribute):
            raise ValueError(f"{owner_name or type(owner).__name__} has an attribute {attribute} of its own")

    def _put(self, module: nn.Module | None) -> None:
        if module is None:
            del self.owner._modules[self.attribute]
        else:
            self.owner.add_module(self.attribute, module)

    def do(self) -> None:
        self._put(self.new)

    def undo(self) -> None:
        self._put(self.old)

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        before, after = ([] if m is None else list(m.parameters()) for m in (self.old, self.new))
        beside = [p for key, m in self.owner._modules.items() if m and key != self.attribute for p in m.parameters()]
        return [*before, *beside], [*after, *beside]

    def describe(self) -> tuple[str, str]:
        return tuple(
            "no module" if m is None else f"{type(m).__name__}({m.extra_repr()})" for m in (self.old, self.new)
        )  # type: ignore


@dataclass(frozen=True)
class FoldLongSkips(Technique):
    """Multiplies the constants of scaled long skips into the layers that read the concatenations; the function stays the same.

    For inference: training goes on differently afterwards. Only a linear layer or convolution that alone reads the concatenation can
    take a factor in; a norm in between, a sum, or gates cannot. A skip times 1 needs no reader.

    Args:
        example_inputs: what the model is called with, to see which columns are the skip's; not needed where the network tells its
            channels, or where a linear layer halves what it reads, as in U-ViT.

    Raises:
        ValueError: a skip that cannot be folded, with the reason; leave its block out with ``where=``.
        NothingToChange: no long skip is scaled by a constant.
    """

    looks_for: ClassVar[str] = "decoder blocks whose long skips hw.ScaleLong has scaled by constants"
    example_inputs: Any = field(default=None, repr=False, compare=False)

    def label(self) -> str:
        return type(self).__name__

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        hosts = {id(site.module): site for site in sites if isinstance(site.module, ScaledHost)}
        left = {id(m.long_skip_layer) for m in model.modules() if isinstance(m, ScaledHost) and id(m) not in hosts}
        found: list[Edit] = []
        for site in hosts.values():
            host: Any = site.module
            found += self._folded(model, site.name, host)
            told = (f"long skips {', '.join(str(i) for i in host.host_at if i is not None)} scaled", "not scaled")
            found.append(SetScaling(Host(site.name, host, ()), None, told))
        for name, owner in model.named_modules() if hosts else ():
            layer = owner._modules.get(NAME)
            if (
                layer is not None
                and any(m.module.long_skip_layer is layer for m in hosts.values())
                and id(layer) not in left
            ):  # type: ignore[union-attr]
                found.append(Attach(owner, NAME, None, name))
        return [*found, *record(model, FoldLongSkips(), sites)] if found else []

    def for_loading(self) -> Technique:
        return _FoldedForm()

    def _folded(self, model: nn.Module, name: str, host: ScaledHost) -> list[Edit]:
        return folded(model, name, host, self.example_inputs)


class _FoldedForm(FoldLongSkips):
    """Only the shape that folding gives a network: its weights are loaded next."""

    def _folded(self, model: nn.Module, name: str, host: ScaledHost) -> list[Edit]:
        return []


def fold(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """Folds all constants of scaled long skips: ``hw.apply(model, FoldLongSkips(example_inputs))``."""
    return apply(model, FoldLongSkips(example_inputs))
