"""What a training run returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..vectors.vector import TaskVector

if TYPE_CHECKING:
    from ..data.rows import RowCounts
    from .loop import Curve

_RISEN = 1.2  # a calibration loss above this multiple of the first one, that of a single batch, is more than noise


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training run.

    Attributes:
        vector: The task vector, in memory.
        calibration_losses: Loss of each calibration step; empty if the mask needed no calibration.
        calibration_lr: Learning rate of calibration; None without calibration. That of training is `curve.lr`.
        curve: Losses, evaluations and speed of training.
        free: Tensor name -> the share of its weights that neither this mask nor an earlier one contains; empty for
            methods without a mask.
        free_share: The same share of all eligible weights; None for methods without a mask.
        entries: Number of entries of the mask, or of the vector for methods without a mask.
        survived: Number of entries that change the bits of their weight. The others are rounded away in the base's
            dtype.
        rows: Counts of the training examples.
        eval_rows: Counts of the evaluation examples.
        unreached: Share of eligible weights in tensors that got no gradient in calibration; None without calibration.
        replaced: Number of entries that drop-and-regrow replaced during training; None if the mask was fixed.
        via_lr: Learning rates of the tickets that were trained first, in their order.
        via_warnings: Their warnings.
    """

    vector: TaskVector
    calibration_losses: list[float]
    calibration_lr: float | None
    curve: Curve
    free: dict[str, float]
    free_share: float | None
    entries: int
    survived: int
    rows: RowCounts
    eval_rows: RowCounts
    unreached: float | None
    replaced: int | None = None
    via_lr: tuple[float, ...] = ()
    via_warnings: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """One sentence for each sign that training did not work as intended."""
        found = [*self.via_warnings]
        losses, changes = self.calibration_losses, f"{self.entries - self.survived:,} of {self.entries:,} changes"
        if len(losses) > 1 and (later := fmean(losses[len(losses) // 2 :])) > _RISEN * losses[0]:
            found.append(
                f"the loss of calibration rose from {losses[0]:.3f} at its first step to {later:.3f} on average over "
                "its last half; try a lower `calibration_lr`"
            )
        if self.curve.rises:
            found.append(
                "the training loss is higher in the last tenth of the steps than in the first; try a lower `lr`"
            )
        if self.curve.losses and 2 * self.survived < self.entries:
            found.append(f"{changes} are too small for the dtype of the base and were rounded away; try a higher `lr`")
        if self.replaced == 0:
            found.append("no entry of the mask was replaced during training: `regrow_steps` had no effect")
        if self.unreached:
            found.append(
                f"{self.unreached:.1%} of the eligible weights are in tensors that got no gradient from the data "
                "during calibration"
            )
        return found

    def summary(self) -> dict[str, Any]:
        """Return the figures of the run, without the vector, as values that JSON can represent."""
        curve = self.curve
        return {
            "first_loss": curve.losses[0] if curve.losses else None,
            "final_loss": curve.final_loss,
            "steps": len(curve.losses),
            "kept_step": curve.kept,
            "lr": curve.lr,
            "via_lr": list(self.via_lr),
            "calibration_lr": self.calibration_lr,
            "calibration_losses": self.calibration_losses,
            "eval_loss": curve.eval_loss,
            "loss_rises": curve.rises,
            "eval_losses": [{"step": step, "loss": loss} for step, loss in curve.eval_losses],
            "eval_metrics": {
                name: [{"step": step, "value": value} for step, value in points]
                for name, points in curve.eval_metrics.items()
            },
            "tokens_per_second": curve.tokens_per_second,
            "rows": asdict(self.rows),
            "eval_rows": asdict(self.eval_rows) if self.eval_rows.rows else None,
            "trained": self.entries,
            "survived": self.survived,
            "replaced": self.replaced,
            "unreached": self.unreached,
            "free_share": self.free_share,
            "free": self.free,
        }
