"""Takes the statistics while a model runs: forward hooks for the signal, tensor hooks on the outputs for its gradient.

The statistics of an output are taken inside the forward hook, before an in-place successor can overwrite it, and the
gradient through ``output.register_hook`` (full backward hooks fail with in-place successors). No activation outlives its
hook. All numbers stay on the device until :meth:`Recorder.rows`, which brings them over in one transfer.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headway.kernels.moments import combine, moments
from headway.signals import statistics
from headway.signals.layout import Layouts, first_tensor
from headway.signals.points import Point
from headway.signals.row import NAN, Row


@dataclass(frozen=True)
class Settings:
    """What is measured and how; the arguments of ``probe`` of the same names."""

    max_samples: int = 64
    max_features: int | None = 65536
    centered: bool = False
    backward: bool = True
    batch_dim: int | Callable[[str, nn.Module, Tensor], int] = 0
    channel_dim: int | None = None
    select: Callable[[str, Any], Any] | None = None
    grad_scale: Any = None
    saved: bool = True
    sync: bool = False
    seed: int = 0


@dataclass(eq=False)
class _Call:
    """One call of one module: its numbers, still on the device."""

    point: Point
    shape: tuple[int, ...]
    dtype: torch.dtype
    scalars: Tensor
    channels: Tensor
    gram: Tensor | None
    tokens: Tensor | None
    batch: int
    keeps_shape: bool
    note: str
    grad_square: Tensor | None = None
    grad_size: int = 1
    saved: int = 0

    def on_gradient(self, grad: Tensor) -> None:
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            if self.dtype is torch.float64 or grad.dtype is torch.float64:
                square = torch.linalg.vector_norm(grad, dtype=torch.float64).square()
            else:
                square = torch.linalg.vector_norm(grad, dtype=torch.float32).double().square()
            self.grad_square, self.grad_size = square, grad.numel()


@dataclass
class _Open:
    """A module that is running: what it has saved for backward so far."""

    module: nn.Module
    saved: int = 0


@dataclass
class Recorder:
    """Attaches to the points of a model for one pass.

    >>> with Recorder(points, settings) as recorder:
    ...     loss = model(x).sum(); recorder.begin_backward(); loss.backward()
    >>> rows = recorder.rows()
    """

    points: Sequence[Point]
    settings: Settings = field(default_factory=Settings)
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        self._handles: list[Any] = []
        self.calls: list[_Call] = []
        self._open: list[_Open] = []
        self._layouts = Layouts(self.settings.batch_dim, self.settings.channel_dim)
        self._in_backward = False
        self._waiting: dict[int, list[_Call]] = {}
        self._last: tuple[weakref.ref[Tensor], int, _Call] | None = None
        self._storages: set[int] = set()
        self._saved_hooks: Any = None
        self._weights: dict[int, list[nn.Parameter]] = {}
        self._grad_norms: dict[int, Tensor] = {}
        self.saved_total = 0

    def __enter__(self) -> Recorder:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Registers the hooks; on an error none is left."""
        try:
            for point in self.points:
                self._handles.append(point.module.register_forward_pre_hook(self._enter, prepend=True))
                hook = self._hook(point)
                self._handles.append(point.module.register_forward_hook(hook, with_kwargs=True))
                own = [
                    p for p in point.module.parameters(recurse=False) if not isinstance(p, nn.UninitializedParameter)
                ]
                own = [p for p in own if p.dim() > 1] or own
                self._weights[id(point.module)] = own
                for parameter in own if self.settings.backward else ():
                    if parameter.requires_grad and parameter.is_leaf:
                        keep = parameter.register_post_accumulate_grad_hook(self._keep_gradient_norm)
                        self._handles.append(keep)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Removes every hook; raises RuntimeError if one could not be removed."""
        self.stop_counting_saved()
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        self._last, self._open = None, []
        left = [h for h in handles if (hooks := h.hooks_dict_ref()) is not None and h.id in hooks]
        if left:
            raise RuntimeError(
                f"{len(left)} hooks of the probe could not be removed; rebuild or reload the model before training"
            )

    def count_saved(self, model: nn.Module) -> None:
        """From here on, counts what autograd keeps for backward, until :meth:`stop_counting_saved`."""
        if not self.settings.saved or not self.settings.backward:
            return
        for tensor in [*model.parameters(), *model.buffers()]:
            if not isinstance(tensor, nn.UninitializedParameter):
                self._storages.add(_storage_key(tensor))
        self._saved_hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._saved_hooks.__enter__()

    def stop_counting_saved(self) -> None:
        hooks, self._saved_hooks = self._saved_hooks, None
        if hooks is not None:
            hooks.__exit__(None, None, None)

    def begin_backward(self) -> None:
        """Modules that run from here on are recomputed by checkpointing; they add gradients, not rows."""
        self.stop_counting_saved()
        self._in_backward = True
        self._last = None

    def _pack(self, tensor: Tensor) -> Any:
        key = _storage_key(tensor)
        if key not in self._storages:
            self._storages.add(key)
            size = tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else 0
            self.saved_total += size
            if self._open:
                self._open[-1].saved += size
        return tensor.detach(), tensor._version

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._open.append(_Open(module))

    def _hook(self, point: Point) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            saved = 0
            while self._open:
                top = self._open.pop()
                saved += top.saved
                if top.module is module:
                    break
            if self._open:
                self._open[-1].saved += saved
            chosen = self.settings.select(point.name, output) if self.settings.select else output
            tensor = first_tensor(chosen)
            if tensor is None or isinstance(tensor, nn.UninitializedParameter):
                return
            with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
                call = self._record(point, args, kwargs, tensor, saved)
            if call is not None and tensor.requires_grad and torch.is_grad_enabled() and self.settings.backward:
                tensor.register_hook(call.on_gradient)

        return hook

    def _record(self, point: Point, args: Any, kwargs: Any, tensor: Tensor, saved: int) -> _Call | None:
        if self._in_backward:
            return self._recomputed(point, tensor)
        call = self._measure(point, tensor)
        call.saved = saved
        source = first_tensor(args)
        if source is None:
            source = first_tensor(kwargs)
        call.keeps_shape = source is not None and source.shape == tensor.shape
        self.calls.append(call)
        self._last = (weakref.ref(tensor), tensor._version if not tensor.is_inference() else 0, call)
        return call

    def _recomputed(self, point: Point, tensor: Tensor) -> _Call | None:
        """The call whose first, gradient-free pass made this very tensor (a reentrant checkpoint runs it again)."""
        waiting = [c for c in self._waiting.get(id(point.module), ()) if c.shape == tuple(tensor.shape)]
        if not waiting:
            return None
        if len(waiting) > 1:
            scalars, _ = moments(tensor, self._layouts.channel(point.module, tensor))
            waiting.sort(key=lambda c: float((c.scalars - scalars).abs().sum()))
        self._waiting[id(point.module)].remove(waiting[0])
        return waiting[0]

    def _measure(self, point: Point, tensor: Tensor) -> _Call:
        settings, notes = self.settings, []
        module = point.module
        batch_axis = self._layouts.batch(point.name, module, tensor)
        channel = self._layouts.channel(module, tensor) if tensor.dim() else 0
        last = self._last
        version = tensor._version if not tensor.is_inference() else 0
        if last is not None and last[0]() is tensor and last[1] == version:
            # a container that hands on what its last module made
            same = last[2]
            scalars, channels, gram, tokens = same.scalars, same.channels, same.gram, same.tokens
            notes = [same.note] if same.note else []
            batch = same.batch
        else:
            x = tensor.detach()
            scalars, channels = moments(x if x.dim() else x[None], channel)
            batch = x.shape[batch_axis] if x.dim() > 1 else 0
            gram = tokens = None
            if batch >= 2:
                size = float(scalars[5]) if x.device.type == "cpu" else 1.0
                gram = statistics.gram(
                    x, batch_axis, settings.max_samples, settings.max_features, settings.centered, settings.seed, size
                )
                if settings.max_features is not None and x.numel() // batch > settings.max_features:
                    notes.append(f"cos from {settings.max_features} of {x.numel() // batch} features")
                if batch > settings.max_samples:
                    notes.append(f"cos from {settings.max_samples} of {batch} samples")
            else:
                notes.append("no batch axis of two or more samples: cos and stable rank are not defined")
            if x.dim() == 3 and channel == 2:
                tokens = statistics.between_tokens(x.movedim(batch_axis, 0), settings.max_samples)
        call = _Call(
            point, tuple(tensor.shape), tensor.dtype, scalars, channels, gram, tokens, batch, False, "; ".join(notes)
        )
        if not settings.sync and call.channels.dim() == 2:
            call.channels = _channel_summary(channels)
        expects = torch.is_grad_enabled() and tensor.requires_grad
        if settings.backward and not expects:
            self._waiting.setdefault(id(module), []).append(call)
        return call

    def _keep_gradient_norm(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            grad = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
            with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
                self._grad_norms[id(parameter)] = torch.linalg.vector_norm(grad.detach(), dtype=_wide(grad)).double()

    def rows(self) -> list[Row]:
        """The rows in order of execution; brings the numbers over from the device."""
        calls = self._confirmed()
        if self.settings.sync:
            _synchronise(calls)
        if not calls:
            return []
        scale = _scale(self.settings.grad_scale)
        device = calls[0].scalars.device
        ranks, cosines, zeros = _likeness(calls)
        packed = []
        for call in calls:
            summary = call.channels if call.channels.dim() == 1 else _channel_summary(call.channels)
            nan = torch.full((), NAN, dtype=torch.float64, device=device)
            extra = [call.tokens, call.grad_square]
            tail = torch.stack([nan if t is None else t.to(device, torch.float64) for t in extra])
            packed.append(torch.cat([call.scalars.to(device), summary.to(device), tail]))
        table = torch.stack(packed).cpu().tolist()
        counts: dict[int, int] = {}
        totals: dict[int, int] = {}
        for call in calls:
            totals[id(call.point.module)] = totals.get(id(call.point.module), 0) + 1
        weights = {id(c.point.module): self._weight_numbers(c.point.module, scale) for c in calls}
        depths: dict[str, int] = {}
        rows = []
        for index, (call, numbers) in enumerate(zip(calls, table, strict=True)):
            key = id(call.point.module)
            counts[key] = counts.get(key, 0) + 1
            name = call.point.name + (f"#{counts[key]}" if totals[key] > 1 else "")
            n, mean, m2, _, m4, largest, zero, bad, var, std, tokens, grad_square = numbers
            depth = depths.get(call.point.kind, 0)
            depths[call.point.kind] = depth + 1
            grad_norm = math.sqrt(grad_square) / scale if grad_square >= 0 else grad_square
            weight_norm, weight_grad, rate = weights[key]
            rows.append(
                Row(
                    name,
                    call.point.kind,
                    depth,
                    call.shape,
                    str(call.dtype).removeprefix("torch."),
                    type(call.point.module).__name__,
                    std=std,
                    var=var,
                    rms=math.sqrt(m2 / n + mean * mean) if n else NAN,
                    mean=mean if n else NAN,
                    kurtosis=n * m4 / m2 / m2 if n and m2 > 1e-300 and m2 * m2 > 0 else NAN,
                    absmax=largest if n else NAN,
                    frac_zero=zero / n if n else NAN,
                    nonfinite=int(bad),
                    cos=cosines[index],
                    between_tokens=tokens,
                    stable_rank=ranks[index],
                    samples=0 if call.gram is None else call.gram.shape[0],
                    zero_samples=zeros[index],
                    grad_norm=grad_norm,
                    grad_rms=grad_norm / math.sqrt(max(1, call.grad_size)),
                    grad_nonfinite=call.grad_square is not None and not math.isfinite(grad_square),
                    weight_norm=weight_norm,
                    weight_grad_norm=weight_grad,
                    effective_lr=rate,
                    saved_bytes=call.saved,
                    note=call.note,
                )
            )
        return rows

    def _confirmed(self) -> list[_Call]:
        """Without the tentative blocks whose stack mostly changes the shape of what it is given."""
        tentative = [call for call in self.calls if call.point.tentative]
        if tentative and sum(call.keeps_shape for call in tentative) * 2 < len(tentative):
            return [call for call in self.calls if not call.point.tentative]
        return self.calls

    def _weight_numbers(self, module: nn.Module, scale: float) -> tuple[float, float, float]:
        own = self._weights.get(id(module), [])
        if not own:
            return NAN, NAN, NAN
        with torch.no_grad(), torch.autocast(own[0].device.type, enabled=False):
            norm = math.sqrt(sum(float(torch.linalg.vector_norm(p.detach(), dtype=_wide(p))) ** 2 for p in own))
        grads = [float(self._grad_norms[id(p)]) ** 2 for p in own if id(p) in self._grad_norms]
        grad = math.sqrt(sum(grads)) / scale if grads else NAN
        rate = NAN
        if self.optimizer is not None and norm > 0:
            mine = {id(p) for p in own}
            for group in self.optimizer.param_groups:
                if any(id(p) in mine for p in group["params"]):
                    numel = sum(p.numel() for p in own)
                    by_gradient = isinstance(self.optimizer, torch.optim.SGD)
                    rate = float(group["lr"]) / (norm**2 if by_gradient else norm / math.sqrt(numel))
                    break
        return norm, grad, rate


def _unpack(packed: Any) -> Tensor:
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a tensor of shape {tuple(tensor.shape)} is at version {tensor._version}; expected version {version} instead"
        )
    return tensor


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def _channel_summary(channels: Tensor) -> Tensor:
    """[var, std] averaged over channels, unbiased, from (count, mean, spread) of every channel."""
    counts, _, spread = channels
    enough = counts > 1
    var = torch.where(enough, spread / (counts - 1).clamp(min=1), 0.0)
    usable = enough.sum()
    return torch.stack([var.sum() / usable, var.sqrt().sum() / usable])


def _scale(grad_scale: Any) -> float:
    if grad_scale is None:
        return 1.0
    value = grad_scale.get_scale() if hasattr(grad_scale, "get_scale") else float(grad_scale)
    if not value > 0:
        raise ValueError(f"grad_scale must be a positive number or a GradScaler, not {grad_scale!r}")
    return float(value)


def _likeness(calls: Sequence[_Call]) -> tuple[list[float], list[float], list[int]]:
    """Stable rank, cos and number of all-zero samples of every call, matrices of one size decomposed together."""
    ranks, cosines, zeros = [NAN] * len(calls), [NAN] * len(calls), [0] * len(calls)
    sizes: dict[tuple[int, torch.device], list[int]] = {}
    for index, call in enumerate(calls):
        if call.gram is not None:
            sizes.setdefault((call.gram.shape[0], call.gram.device), []).append(index)
    for members in sizes.values():
        unique: dict[int, list[int]] = {}
        for index in members:
            unique.setdefault(id(calls[index].gram), []).append(index)
        shared = list(unique.values())
        grams = [calls[same[0]].gram for same in shared]
        stacked = torch.stack([gram for gram in grams if gram is not None])
        # one matrix at a time on the CPU: LAPACK of a stack costs the same and would hold it twice
        numbers = torch.stack(
            [statistics.rank_of(stacked), statistics.cosine_of(stacked), statistics.cosines(stacked)[1].double()]
        ).tolist()
        for position, same in enumerate(shared):
            for index in same:
                ranks[index], cosines[index] = numbers[0][position], numbers[1][position]
                zeros[index] = int(numbers[2][position])
    return ranks, cosines, zeros


def _synchronise(calls: Sequence[_Call]) -> None:
    """Puts the moments of all ranks together and adds the squares of their gradients; likeness stays this rank's own."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "sync=True needs an initialised process group; call torch.distributed.init_process_group first"
        )
    if not calls:
        return
    zero = calls[0].scalars.new_zeros(())
    parts = [
        torch.cat([c.scalars, c.channels.flatten(), (zero if c.grad_square is None else c.grad_square)[None]])
        for c in calls
    ]
    mine = torch.cat(parts)
    sizes = [torch.zeros((), dtype=torch.int64, device=mine.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor(mine.numel(), device=mine.device))
    if len({int(size) for size in sizes}) > 1:
        raise RuntimeError("sync=True needs the same modules to run on every rank; the ranks recorded different rows")
    everyone = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(everyone, mine)
    start = 0
    for call, part in zip(calls, parts, strict=True):
        shape = call.channels.shape
        shards = [ranks[start : start + part.numel()] for ranks in everyone]
        start += part.numel()
        total = (shards[0][:8], shards[0][8:-1].view(shape))
        for shard in shards[1:]:
            total = combine(total, (shard[:8], shard[8:-1].view(shape)))
        call.scalars, call.channels = total
        if call.grad_square is not None:
            call.grad_square = torch.stack([shard[-1] for shard in shards]).sum()
            call.grad_size *= len(shards)
