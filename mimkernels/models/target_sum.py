"""Heads and losses of a model that predicts one target, or several at once."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mimkernels.models.targets import parse_targets

__all__ = ["FeatureWidths", "Heads", "TargetSum"]

FeatureWidths = int | Sequence[int | None] | None


class Heads(nn.ModuleList):
    """Linear layers side by side, one for each target."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """The prediction of each head."""
        return [head(x) for head in self]


class TargetSum:
    """The targets of a model: their heads, what they are compared with, and the sum of their losses.

    Args:
        text: a target, or several with weights, as ``parse_targets`` takes them.
        widths: of features, where the targets have any: a number of a single one, a list with one each of several;
            None, of all or of one of them, is the width of the encoder.

    Attributes:
        terms: the targets.
        widths: one for each that is a teacher's features.

    Raises:
        ValueError: the text is none, or the widths are not those of its features; shows both sides.
    """

    def __init__(self, text: str, widths: FeatureWidths = None) -> None:
        self.text, self.terms = text, parse_targets(text)
        count = len(self.of_features)
        if widths is not None and not count:
            raise ValueError(f"target_dim is the width of a teacher's features, got {widths} and target {text!r}")
        given = [widths] * count if widths is None or (isinstance(widths, int) and count == 1) else widths
        if isinstance(given, int) or len(given) != count:
            raise ValueError(
                f"target_dim must be one width for each target that is features, of which {text!r} has {count}, got "
                f"{widths}"
            )
        if any(width is not None and width < 1 for width in given):
            raise ValueError(f"target_dim must be at least 1, got {widths}")
        self.widths: list[int | None] = list(given)

    @property
    def of_features(self) -> list[int]:
        """The targets that are a teacher's features, by their place in the sum."""
        return [place for place, term in enumerate(self.terms) if term.target.features is not None]

    @property
    def painted(self) -> int:
        """The place of the target that pictures show: the first one of pixels, or the first of all."""
        return next((place for place, term in enumerate(self.terms) if term.target.features is None), 0)

    @property
    def any_of_all_tokens(self) -> bool:
        """Whether one of them compares features of all tokens, masked or not."""
        return any(not self.terms[place].of_masked_tokens for place in self.of_features)

    def outputs(self, *, pixels: int, encoder: int) -> list[int]:
        """How many values the head of each target gives per token.

        Args:
            pixels: values of the pixels that a token predicts.
            encoder: width of the encoder.
        """
        sizes = [pixels] * len(self.terms)
        for place, width in zip(self.of_features, self.widths, strict=True):
            sizes[place] = encoder if width is None else width
        return sizes

    def given(self, features: Tensor | Sequence[Tensor] | None) -> list[Tensor | None]:
        """The features that each target is compared with; None of pixels.

        Args:
            features: as ``forward`` of a model takes them: of several targets of features a list, in their order.

        Raises:
            ValueError: there are others than the targets need.
        """
        places = self.of_features
        if (features is None) != (not places):
            raise ValueError(f"target {self.text!r}, features {'not ' if features is None else ''}given")
        several: Sequence[Tensor] = [features] if isinstance(features, Tensor) else features or ()
        if len(several) != len(places):
            raise ValueError(
                f"features must be those of each target that is features, of which {self.text!r} has {len(places)}, "
                f"got {len(several)}"
            )
        by_term: list[Tensor | None] = [None] * len(self.terms)
        for place, each in zip(places, several, strict=True):
            by_term[place] = each
        return by_term

    def total(self, losses: Sequence[Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The weighted sum of the losses, and each by name, without gradient; of a single one itself alone."""
        if len(losses) == 1:
            return losses[0], {}
        loss = sum(term.weight * loss for term, loss in zip(self.terms, losses, strict=True))
        assert isinstance(loss, Tensor)
        return loss, {f"loss_{term.name}": each.detach() for term, each in zip(self.terms, losses, strict=True)}
