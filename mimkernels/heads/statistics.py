"""Per-layer, per-head statistics over a data set: mean and variance over images."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mimkernels.heads import derived, sinks
from mimkernels.heads import tokens as token_maps
from mimkernels.heads.presets import (
    BEYOND_CLS,
    QUANTITIES,
    UNIT_NAMES,
    UNITS,
    Preset,
    Quantity,
    find_preset,
    find_quantity,
    required_stats,
)
from mimkernels.nn.processes import distributed, gather_objects
from mimkernels.ops import AttentionOutput, head_divergence, received_attention
from mimkernels.ops._checks import count, integer, is_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["HeadStatistics"]

# Of HeadStatistics, what to_dict writes and from_dict needs.
_OPTIONS = ("quantities", "num_prefix", "unit", "exclude_prefix", "symmetrize", "exact_eps")


@dataclass
class _Layer:
    """Sums over images of one layer's values: columns are quantities, each with its heads, in order of ``names``."""

    heads: int
    images: int
    sums: Tensor  # [3, columns] fp64: of values, of their squares, and of images that count

    def means(self) -> Tensor:
        """Over images, ``[columns]`` on the CPU; NaN without images."""
        sums, _, counts = self.sums.cpu().unbind()
        return sums / counts

    def variances(self) -> Tensor:
        """Unbiased, over images, ``[columns]`` on the CPU; NaN for fewer than two images."""
        sums, squares, counts = self.sums.cpu().unbind()
        variances = ((squares - sums.square() / counts) / (counts - 1)).clamp(min=0.0)
        return torch.where(counts < 2, torch.nan, variances)


class HeadStatistics:
    """Accumulates, per layer and head, what attention does, over batches and processes.

    Values are per image first (means over patch queries, mutual information, divergences), then averaged over images.
    Images (windows) in which no query sees a key have no ``max_score``: they do not count in its mean and variance.
    Sums stay on the device where they were made, in float64; nothing waits for the device until results are read.

    Args:
        presets: what to record, as the published code does: a preset's name (``dosovitskiy``, ``park``, ``walmer``,
            ``beyond_cls``) or a ``Preset``, or several. See ``PRESETS`` for sources.
        quantities: more to record, names in ``QUANTITIES``: row statistics of ``attention`` (``entropy``,
            ``distance``, ``prefix_mass``, ...), ``renormalized_distance``, ``nmi``, ``head_divergence``,
            ``patch_head_divergence``, token magnitudes. Mutual information and head divergences cost a further pass
            over q and k each; row statistics cost almost nothing.
        num_prefix: P, leading tokens ([cls], registers) that are no patches; the same as given to ``attention``.
        unit: of distances, "pixel" | "patch" | "unit": that of the positions given to ``attention``. The presets' if
            None, "patch" without presets.
        exclude_prefix: leave prefix queries out of the means of row statistics (they have distance 0, which would
            shorten it). The presets' if None, else True.
        symmetrize: head divergences are the mean of both directions.
        exact_eps: Beyond-[cls] entropies with the eps inside the logarithm, as published. Needs q, k and lse, and
            costs another pass of plain attention; without it they are within ``N * 1e-6`` nats.
        grid: rows and columns of patches, for ``high_frequency``; a square one if None.

    Attributes:
        names: the recorded quantities, in order.
        row_stats: what to ask of ``attention(..., stats=...)``.
        inputs: what ``update`` needs besides, of "q", "k", "v", "lse", "tokens", "output".

    Raises:
        ValueError: an unknown preset, quantity or unit, or presets that contradict each other or the arguments.

    Example::

        seen = HeadStatistics("park", quantities=["entropy", "head_divergence"], num_prefix=1)
        positions = PRESETS["park"].positions(14, patch_size=16)
        for layer, (q, k, v) in enumerate(layers):  # for every batch
            output = attention(q, k, v, num_prefix=1, positions=positions, stats=seen.row_stats)
            seen.update(layer, output, q=q, k=k)
        print(seen.table())
    """

    def __init__(
        self,
        presets: str | Preset | Iterable[str | Preset] = (),
        *,
        quantities: Sequence[str] = (),
        num_prefix: int = 0,
        unit: str | None = None,
        exclude_prefix: bool | None = None,
        symmetrize: bool = False,
        exact_eps: bool = False,
        grid: Sequence[int] | None = None,
    ) -> None:
        given = (presets,) if isinstance(presets, str | Preset) else presets
        for argument, names in (("presets", given), ("quantities", quantities)):
            if isinstance(names, str | Tensor) or not isinstance(names, Iterable):
                raise TypeError(f"{argument} must be a sequence of names, got {type(names).__name__} {names!r:.60}")
        chosen = [find_preset(item) for item in given]
        wanted = [*(name for preset in chosen for name in preset.quantities), *quantities]
        self.names: tuple[str, ...] = tuple(dict.fromkeys(find_quantity(name).name for name in wanted))
        if not self.names:
            raise ValueError("HeadStatistics needs at least one preset or quantity; see PRESETS and QUANTITIES")
        self.presets = tuple(preset.name for preset in chosen)
        self.num_prefix = integer("HeadStatistics", "num_prefix", num_prefix)
        if not isinstance(unit, str | None) or not isinstance(exclude_prefix, bool | None):
            raise TypeError(
                f"unit must be a str and exclude_prefix a bool, got {unit!r:.60} and {exclude_prefix!r:.60}"
            )
        self.unit: str = _agreed("unit", unit, chosen, default="patch")
        self.exclude_prefix: bool = _agreed("exclude_prefix", exclude_prefix, chosen, default=True)
        self.symmetrize = bool(symmetrize)
        self.exact_eps = bool(exact_eps)
        if grid is not None and (not isinstance(grid, Sequence) or isinstance(grid, str) or len(grid) != 2):
            raise TypeError(f"grid must be (rows, columns) of patches, got {grid!r:.60}")
        self.grid = None if grid is None else (int(grid[0]), int(grid[1]))
        self.eps = next((preset.eps for preset in chosen if preset.eps), 1e-6)
        if self.num_prefix < 0:
            raise ValueError(f"num_prefix must not be negative, got {num_prefix}")
        if self.unit not in UNITS:
            raise ValueError(f"unknown unit {unit!r}; known: {', '.join(UNITS)}")
        of_cls = [name for name in self.names if name.startswith("cls_")]
        if of_cls and self.num_prefix == 0:
            raise ValueError(f"{of_cls[0]} needs a [cls] token, but num_prefix is 0")
        self.row_stats = required_stats(self.names)
        inputs = [name for quantity in self._quantities() for name in quantity.inputs]
        if self.exact_eps and {"cls_pos_entropy", "pos_pos_entropy"} & set(self.names):
            inputs += ["q", "k", "lse"]
        self.inputs: tuple[str, ...] = tuple(dict.fromkeys(inputs))
        self._layers: dict[int, _Layer] = {}

    def _quantities(self) -> list[Quantity]:
        return [QUANTITIES[name] for name in self.names]

    # Recording

    @torch.no_grad()
    def update(
        self,
        layer: int,
        stats: Mapping[str, Tensor] | AttentionOutput,
        *,
        q: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        lse: Tensor | None = None,
        bias: Tensor | None = None,
        bias_table: Tensor | None = None,
        bias_index: Tensor | None = None,
        key_mask: Tensor | None = None,
        logit_scale: Tensor | None = None,
        scale: float | None = None,
        tokens: Tensor | None = None,
        output: Tensor | None = None,
        windows: int = 1,
        grid: Sequence[int] | None = None,
        backend: str = "auto",
    ) -> None:
        """Add one batch of one layer. Does not wait for the device.

        Args:
            layer: its number, from 0.
            stats: what ``attention`` returned, or only its statistics, each ``[B, H, N]``.
            q, k: ``[B, H, N, D]``, for mutual information, head divergences, sinks and ``exact_eps``. For
                ``head_divergence`` alone, k may be of other tokens than q.
            v: ``[B, H, N, D]``, for the value of sinks.
            lse: ``[B, H, N]``; taken from ``stats`` if that is the whole output of ``attention``.
            bias, bias_table, bias_index, key_mask, logit_scale, scale: as given to ``attention``; needed wherever q and
                k are.
            tokens: ``[B, N, D]`` the block's input, for token magnitudes.
            output: ``[B, N, D]`` attention's output after the projection, before LayerScale, for its magnitudes.
            windows: per image, if attention runs in windows: so many neighbours of the batch are one image, whose value
                is the mean over them.
            grid: rows and columns of these patches, where layers differ in theirs.
            backend: of the companion ops.

        Raises:
            ValueError: something that a recorded quantity needs is missing, or shapes disagree with each other or
                with earlier batches.
        """
        layer = integer("HeadStatistics", "layer", layer)
        count("HeadStatistics", "windows", windows)
        if not isinstance(stats, AttentionOutput | Mapping):
            raise TypeError(f"stats must be what attention returned, or its stats, got {type(stats).__name__}")
        if layer < 0:
            raise ValueError(f"layers are numbered from 0, got {layer}")
        if isinstance(stats, AttentionOutput):
            lse = stats.lse if lse is None else lse
            stats = stats.stats
        given: dict[str, Any] = {"q": q, "k": k, "v": v, "lse": lse, "tokens": tokens, "output": output}
        self._check_given(stats, given)
        rows = {name: stats[name].detach() for name in self.row_stats}
        heads = self._check_shapes(layer, rows, given)
        scores: dict[str, Any] = {
            "bias": bias,
            "bias_table": bias_table,
            "bias_index": bias_index,
            "key_mask": key_mask,
            "logit_scale": logit_scale,
            "scale": scale,
        }
        options = {**scores, "backend": backend}
        given["grid"] = self.grid if grid is None else grid
        if self.exact_eps and {"cls_pos_entropy", "pos_pos_entropy"} & set(self.names):
            assert q is not None and k is not None
            rows["eps_patch_entropy"] = derived.eps_patch_entropy(q, k, self.num_prefix, eps=self.eps, **scores)
        # Everything side by side, [B, columns]: one pass of float64 sums for all quantities.
        columns = torch.cat([self._values(name, rows, given, options) for name in self.names], dim=1).double()
        counted = columns != -torch.inf  # the maximum of nothing
        columns = columns.where(counted, 0.0)
        if windows != 1:
            if windows < 1 or len(columns) % windows:
                raise ValueError(f"{len(columns)} windows cannot be {windows} of each image")
            of_image = counted.unflatten(0, (-1, windows)).sum(1)
            columns = columns.unflatten(0, (-1, windows)).sum(1) / of_image.clamp(min=1)
            counted = of_image > 0
        sums = torch.stack((columns.sum(0), columns.square().sum(0), counted.sum(0).double()))
        old = self._layers.get(layer)
        if old is None:
            self._layers[layer] = _Layer(heads, len(columns), sums)
        else:
            # Not in place: sums made under inference_mode could not be changed outside it.
            self._layers[layer] = _Layer(heads, old.images + len(columns), old.sums + sums.to(old.sums.device))

    def _values(self, name: str, rows: dict[str, Tensor], given: dict[str, Any], options: dict[str, Any]) -> Tensor:
        """``[B, H]`` of one quantity; ``[B, 1]`` of one that a layer has once."""
        q, k, lse = given["q"], given["k"], given["lse"]
        if name in BEYOND_CLS:
            return derived.beyond_cls_rows(name, rows, self.num_prefix, self.eps)
        if name == "renormalized_distance":
            row = derived.renormalized_distance(rows["distance"], rows["patch_mass"])
            return derived.query_mean(row, self.num_prefix, exclude_prefix=self.exclude_prefix)
        if name == "normalized_entropy":
            row = derived.normalized_entropy(rows["entropy"], options["bias"], options["key_mask"])
            return derived.query_mean(row, self.num_prefix, exclude_prefix=self.exclude_prefix)
        if name == "max_score":
            row = rows["max_score"][..., self.num_prefix if self.exclude_prefix else 0 :]
            return row.amax(-1)
        if name == "argmax_is_prefix":
            row = ((rows["argmax"] >= 0) & (rows["argmax"] < self.num_prefix)).float()
            return derived.query_mean(row, self.num_prefix, exclude_prefix=self.exclude_prefix)
        if name == "nmi":
            return derived.patch_nmi(q, k, lse, rows["patch_entropy"], rows["patch_mass"], self.num_prefix, **options)
        if name == "head_divergence":
            return derived.per_head_divergence(head_divergence(q, k, lse, **options), symmetrize=self.symmetrize)
        if name == "patch_head_divergence":
            between = derived.patch_head_divergence(q, k, lse, rows["patch_mass"], self.num_prefix, **options)
            return derived.per_head_divergence(between, symmetrize=self.symmetrize)
        if name in sinks.SINKS:
            if given.get("received") is None:  # once for all of them
                given["received"] = received_attention(q, k, lse, **options)
            return sinks.sink_of(name, given["received"], self.num_prefix, given["v"])
        if name == "token_similarity":
            return token_maps.token_similarity(given["tokens"].detach(), self.num_prefix)[:, None]
        if name == "high_frequency":
            return token_maps.high_frequency(given["tokens"].detach(), given["grid"], self.num_prefix)[:, None]
        if name.endswith("_magnitude"):
            x = given["output" if "output" in name else "tokens"].detach()
            norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)  # [B, N]
            norms = norms[:, 0] if name.startswith("cls_") else norms[:, self.num_prefix :].mean(-1)
            return norms[:, None]
        return derived.query_mean(rows[name], self.num_prefix, exclude_prefix=self.exclude_prefix)

    def _check_given(self, stats: Mapping[str, Tensor], given: dict[str, Tensor | None]) -> None:
        for quantity in self._quantities():
            missing = [name for name in quantity.row_stats if name not in stats]
            if missing:
                raise ValueError(
                    f"{quantity.name} needs the row statistics {', '.join(quantity.row_stats)} of attention; got "
                    f"{', '.join(stats) or 'none'}: ask for stats={self.row_stats}"
                )
        missing = [name for name in self.inputs if given[name] is None]
        if missing:
            users = [item.name for item in self._quantities() if set(item.inputs) & set(missing)]
            raise ValueError(f"{', '.join(users) or 'exact_eps'} needs {', '.join(missing)}, got None")

    def _check_shapes(self, layer: int, rows: dict[str, Tensor], given: dict[str, Tensor | None]) -> int:
        shape: tuple[int, ...] | None = None
        for name, row in rows.items():
            if row.dim() != 3 or (shape is not None and tuple(row.shape) != shape):
                raise ValueError(
                    f"{name} must be [B, H, N]{f' = {list(shape)}' if shape else ''}, got {list(row.shape)}"
                )
            shape = tuple(row.shape)
        # Of all that needs keys, only how heads differ is of cross-attention, too.
        crossed = not self.exact_eps and not rows.keys() & {"self_mass", "distance"}
        crossed = crossed and all(item.name == "head_divergence" for item in self._quantities() if "k" in item.inputs)
        for name in self.inputs:
            tensor = given[name]
            is_tensor("HeadStatistics", name, tensor)
            assert tensor is not None
            wide = name in ("tokens", "output")
            if tensor.dim() != (4 if name in "qkv" else 3):
                wanted = "[B, N, D]" if wide else "[B, H, N]" if name == "lse" else "[B, H, N, D]"
                raise ValueError(f"{name} must be {wanted}, got {list(tensor.shape)}")
            if shape is None and not wide:
                shape = tuple(tensor.shape[:3])
            if shape is not None:
                here = (tensor.shape[0], tensor.shape[1]) if wide else tuple(tensor.shape[:3])
                if name == "k" and crossed:
                    here = (*here[:2], shape[2])
                if here != ((shape[0], shape[2]) if wide else shape):
                    raise ValueError(
                        f"{name} {list(tensor.shape)} does not fit statistics of [B, H, N] = {list(shape)}"
                    )
        heads = shape[1] if shape is not None else 1
        old = self._layers.get(layer)
        if old is not None and old.heads != heads:
            raise ValueError(f"layer {layer} had {old.heads} heads in earlier batches, now {heads}")
        if shape is None:
            first = given[self.inputs[0]]
            assert first is not None
            tokens = first.shape[1]
        else:
            tokens = shape[2]
        if tokens <= self.num_prefix:
            raise ValueError(f"no patch tokens: {tokens} tokens, of which num_prefix is {self.num_prefix}")
        return heads

    # Combining

    def _settings(self) -> dict[str, Any]:
        return {
            "presets": list(self.presets),
            "quantities": list(self.names),
            "num_prefix": self.num_prefix,
            "unit": self.unit,
            "exclude_prefix": self.exclude_prefix,
            "symmetrize": self.symmetrize,
            "exact_eps": self.exact_eps,
            "eps": self.eps,
            "grid": None if self.grid is None else list(self.grid),
        }

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any]) -> HeadStatistics:
        statistics = cls(**{key: settings[key] for key in _OPTIONS}, grid=settings.get("grid"))
        # Presets of the caller's own are known by their settings alone.
        statistics.presets, statistics.eps = tuple(settings["presets"]), settings["eps"]
        return statistics

    def merge(self, other: HeadStatistics) -> HeadStatistics:
        """Add what ``other`` recorded, as if this object had seen its images too.

        Returns:
            this object.

        Raises:
            ValueError: the two were set up differently, or a layer has different head counts.
        """
        if not isinstance(other, HeadStatistics):
            raise TypeError(f"HeadStatistics are merged with HeadStatistics, got {type(other).__name__}")
        if self._settings() != other._settings():
            differ = {key: (value, other._settings()[key]) for key, value in self._settings().items()}
            differ = {key: pair for key, pair in differ.items() if pair[0] != pair[1]}
            raise ValueError(f"these statistics were set up differently: {differ}")
        for number, theirs in other._layers.items():
            ours = self._layers.get(number)
            if ours is None:
                self._layers[number] = _Layer(theirs.heads, theirs.images, theirs.sums.clone())
                continue
            if ours.heads != theirs.heads:
                raise ValueError(f"layer {number} has {ours.heads} heads here and {theirs.heads} there")
            self._layers[number] = _Layer(
                ours.heads, ours.images + theirs.images, ours.sums + theirs.sums.to(ours.sums.device)
            )
        return self

    def reduce(self, group: ProcessGroup | None = None) -> HeadStatistics:
        """The statistics over all processes of ``torch.distributed``, as a new object; this one stays as it is.

        Every process of the group must call it; some may have seen nothing, or other layers. Without a process group
        the result is a copy.

        Raises:
            ValueError: processes disagree about a layer's heads.
        """
        total = self._from_settings(self._settings())
        if not distributed():
            return total.merge(self)
        mine = {number: (layer.heads, layer.images) for number, layer in self._layers.items()}
        heads: dict[int, int] = {}
        images: dict[int, int] = {}
        for number, (heads_there, some) in (
            item for process in gather_objects(mine, group) for item in process.items()
        ):
            images[number] = images.get(number, 0) + some
            if heads.setdefault(number, heads_there) != heads_there:
                raise ValueError(
                    f"layer {number} has {heads[number]} heads in one process and {heads_there} in another"
                )
        if not heads:
            return total
        device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.distributed.get_backend(group) == "nccl"
            else "cpu"
        )
        order = sorted(heads)
        sizes = [3 * self._columns(heads[number]) for number in order]
        flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        for number, part in zip(order, flat.split(sizes), strict=True):
            if number in self._layers:
                part.copy_(self._layers[number].sums.flatten())
        torch.distributed.all_reduce(flat, group=group)
        for number, part in zip(order, flat.split(sizes), strict=True):
            total._layers[number] = _Layer(heads[number], images[number], part.view(3, -1).clone())
        return total

    def reset(self) -> None:
        """Forget what was recorded; the settings stay."""
        self._layers.clear()

    # Reading

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that were recorded, in order."""
        return tuple(sorted(self._layers))

    @property
    def images(self) -> dict[int, int]:
        """Images seen, by layer."""
        return {number: self._layers[number].images for number in self.layers}

    def _columns(self, heads: int) -> int:
        return sum(heads if quantity.per_head else 1 for quantity in self._quantities())

    def _places(self, layer: _Layer) -> dict[str, slice]:
        """Where each quantity's heads lie among the columns of a layer."""
        slices, start = {}, 0
        for quantity in self._quantities():
            size = layer.heads if quantity.per_head else 1
            slices[quantity.name] = slice(start, start + size)
            start += size
        return slices

    def _of_layers(self, name: str, values: Callable[[_Layer], Tensor]) -> list[Tensor]:
        """The columns of one quantity in ``values`` of every layer."""
        if name not in self.names:
            raise ValueError(f"{name!r:.60} was not recorded; recorded: {', '.join(self.names)}")
        layers = [self._layers[number] for number in self.layers]
        return [values(layer)[self._places(layer)[name]] for layer in layers]

    def mean(self, name: str) -> Tensor:
        """Mean over images, ``[layers, H]`` float64 on the CPU (H = 1 for what a layer has once).

        Rows are ``layers``, in order. Layers with fewer heads are filled up with NaN.
        """
        return _stacked(self._of_layers(name, _Layer.means))

    def variance(self, name: str) -> Tensor:
        """Unbiased variance over images, ``[layers, H]`` float64; NaN for fewer than two images."""
        return _stacked(self._of_layers(name, _Layer.variances))

    def std(self, name: str) -> Tensor:
        """Standard deviation over images, ``[layers, H]`` float64."""
        return self.variance(name).sqrt()

    def layer_mean(self, name: str) -> Tensor:
        """Mean over images and heads, ``[layers]`` float64. For head divergence, the mean over ordered pairs."""
        means = [heads.mean() for heads in self._of_layers(name, _Layer.means)]
        return torch.stack(means) if means else torch.zeros(0, dtype=torch.float64, device="cpu")

    def beyond_cls(self) -> Tensor:
        """``[layers, 8]`` float64: the preset ``beyond_cls`` in its published order, means over images and heads.

        Raises:
            ValueError: the preset was not recorded.
        """
        return torch.stack([self.layer_mean(name) for name in BEYOND_CLS], dim=1)

    @staticmethod
    def is_per_head(name: str) -> bool:
        """Whether a layer has one number of this quantity for every head, not one alone."""
        return find_quantity(name).per_head

    def unit_of(self, name: str) -> str:
        """The unit of a quantity, for people: "nats", "pixels", ..., or "" for a pure number."""
        unit = find_quantity(name).unit
        return UNIT_NAMES[self.unit] if unit == "distance" else unit

    def label_of(self, name: str) -> str:
        """A quantity's name for people, with its unit."""
        unit = self.unit_of(name)
        return find_quantity(name).label + (f" ({unit})" if unit else "")

    # Giving out

    def table(self, names: Sequence[str] | None = None) -> str:
        """Text for people: per layer, each quantity's mean over heads, and the lowest and highest head."""
        if not self._layers:
            return "no layer recorded yet"
        width = 26
        names = self.names if names is None else tuple(names)
        lines = []
        # Four quantities side by side fill a terminal.
        for first in range(0, len(names), 4):
            some = names[first : first + 4]
            units = [self.unit_of(name) for name in some]
            titles = [f"{name} ({unit})" if unit else name for name, unit in zip(some, units, strict=True)]
            widths = [max(width, len(title)) for title in titles]
            heading = "  ".join(title.rjust(size) for title, size in zip(titles, widths, strict=True))
            under = "  ".join("mean [lowest, highest]".rjust(size) for size in widths)
            lines += [f"layer  {heading}", f"       {under}"]
            means = [self._of_layers(name, _Layer.means) for name in some]
            for row, number in enumerate(self.layers):
                cells = [_cell(mean[row]).rjust(size) for mean, size in zip(means, widths, strict=True)]
                lines.append(f"{number:5d}  " + "  ".join(cells))
            lines.append("")
        images = sorted(set(self.images.values()))
        lines.append(f"{' to '.join(str(count) for count in {images[0]: 0, images[-1]: 0})} images")
        return "\n".join(lines)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """One line per quantity, layer and head: ``quantity,unit,layer,head,mean,std,images``, full precision.

        ``head`` is empty for what a layer has once.
        """
        with open(path, "w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(("quantity", "unit", "layer", "head", "mean", "std", "images"))
            for name in self.names:
                means, variances = (self._of_layers(name, of) for of in (_Layer.means, _Layer.variances))
                for number, mean, variance in zip(self.layers, means, variances, strict=True):
                    for head, values in enumerate(zip(mean.tolist(), variance.sqrt().tolist(), strict=True)):
                        shown = head if QUANTITIES[name].per_head else ""
                        numbers = map(repr, values)
                        out.writerow((name, self.unit_of(name), number, shown, *numbers, self.images[number]))

    def to_dict(self) -> dict[str, Any]:
        """Settings, sums and results as plain Python, for JSON; ``from_dict`` restores the object exactly."""
        recorded = {}
        for number in self.layers:
            layer = self._layers[number]
            entry: dict[str, Any] = {"images": layer.images, "heads": layer.heads}
            moments = {"mean": layer.means(), "std": layer.variances().sqrt(), "sum": layer.sums[0]}
            moments["sum_of_squares"] = layer.sums[1]
            lists = {key: values.tolist() for key, values in moments.items()}
            counts = layer.sums[2].tolist()
            for name, columns in self._places(layer).items():
                entry[name] = {key: values[columns] for key, values in lists.items()}
                if min(counts[columns]) < layer.images:
                    entry[name]["images"] = counts[columns]
            recorded[str(number)] = entry
        return {"format": 1, **self._settings(), "layers": recorded}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeadStatistics:
        """What ``to_dict`` gave, back; also after JSON.

        Raises:
            ValueError: another format, a setting that is missing, or a layer without one of the quantities.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"head statistics are read from what to_dict gave, got {type(data).__name__}")
        if data.get("format") != 1:
            raise ValueError(f"head statistics of format {data.get('format')!r} are not known; this library writes 1")
        absent = [key for key in (*_OPTIONS, "presets", "eps", "layers") if key not in data]
        if absent:
            raise ValueError(f"head statistics lack {', '.join(absent)}; given: {', '.join(map(str, data))}")
        statistics = cls._from_settings(data)
        for number, layer in data["layers"].items():
            missing = [name for name in statistics.names if name not in layer]
            if missing:
                raise ValueError(f"layer {number} lacks {', '.join(missing)}")
            images = int(layer["images"])
            sums = [[x for name in statistics.names for x in layer[name][key]] for key in ("sum", "sum_of_squares")]
            counts = [layer[name].get("images", [images] * len(layer[name]["sum"])) for name in statistics.names]
            sums.append([count for columns in counts for count in columns])
            statistics._layers[int(number)] = _Layer(
                int(layer["heads"]), images, torch.tensor(sums, dtype=torch.float64, device="cpu")
            )
        return statistics

    def __repr__(self) -> str:
        images = max(self.images.values(), default=0)
        return f"HeadStatistics({', '.join(self.names)}; {len(self._layers)} layers, {images} images)"


def _agreed(setting: str, given: Any, presets: Sequence[Preset], *, default: Any) -> Any:
    """The setting that the argument and all presets agree on."""
    wanted = {preset.name: getattr(preset, setting) for preset in presets if getattr(preset, setting) is not None}
    if given is not None:
        wanted["the argument"] = given
    if len(set(wanted.values())) > 1:
        shown = ", ".join(f"{name}: {value!r}" for name, value in wanted.items())
        raise ValueError(f"{setting} cannot differ within one HeadStatistics ({shown}); use one for each")
    return next(iter(wanted.values()), default)


def _stacked(rows: list[Tensor]) -> Tensor:
    if not rows:
        return torch.zeros(0, 0, dtype=torch.float64, device="cpu")
    widest = max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, widest - len(row)), value=torch.nan) for row in rows])


def _cell(heads: Tensor) -> str:
    mean = f"{heads.mean().item():.4g}"
    return mean if len(heads) == 1 else f"{mean} [{heads.min().item():.4g}, {heads.max().item():.4g}]"
