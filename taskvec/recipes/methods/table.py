"""The methods of merge files: mergekit's on whole models, and those on task vectors under mergekit's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...arguments import shown
from ...errors import UsageError
from ...merging.registry import AUTO, METHODS, method_of
from .engine import Function
from .fusion import ARCEE_FUSION
from .pointwise import AVERAGE, NEARSWAP, SCALED
from .spheres import KARCHER, MODEL_STOCK, MULTISLERP, NUSLERP, SLERP

# mergekit's name -> taskvec's, of methods on task vectors
VECTOR_NAMES = {"task_arithmetic": "linear"}
# methods on whole models that have another name in taskvec
WHOLE_NAMES = {"linear": "average"}
REQUIRED = object()


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method on whole models.

    Attributes:
        default: Its default value. REQUIRED if it must be given, None if it may be left out.
        scope: Whether there is one value for all models, one per model, or one per model that is not the base.
        kind: float, int or bool.
    """

    default: Any
    scope: Literal["all", "model", "not base"] = "all"
    kind: type = float


@dataclass(frozen=True)
class WholeMethod:
    """A merge method on whole models.

    Attributes:
        name: The name in mergekit.
        function: Computes a tensor of the result.
        summary: One line that describes the method.
        source: The URL of its publication.
        parameters: Name -> parameter.
        base: Whether a base is required, may be given, or is a model like the others.
        least: The smallest number of models, the base included.
        most: The largest number of models, or None.
        bases_apart: Whether the base is not counted in `least` and `most`.
    """

    name: str
    function: Function
    summary: str
    source: str
    parameters: Mapping[str, Parameter]
    base: Literal["required", "optional", "ignored"] = "ignored"
    least: int = 1
    most: int | None = None
    bases_apart: bool = False

    @property
    def title(self) -> str:
        """The name in reports."""
        return WHOLE_NAMES.get(self.name, self.name)

    def check(self, count: int, *, has_base: bool, where: str = "") -> None:
        """Check the models of a merge.

        Args:
            count: The number of models, the base included.
            has_base: Whether one of them is the base.
            where: The part of the recipe, as in "slice 2: ", for errors.

        Raises:
            UsageError: There are too many or too few models, or the base is missing.
        """
        if self.base == "required" and not has_base:
            raise UsageError(f"{where}{self.name} needs base_model to be one of the models")
        found = count - (has_base and self.bases_apart)
        if found < self.least or (self.most is not None and found > self.most):
            wanted = f"{self.least}" if self.least == self.most else f"at least {self.least}"
            wanted = f"at most {self.most}" if found > self.least and self.least != self.most else wanted
            beside = (
                " beside base_model" if self.bases_apart else ", the base included" if self.base == "required" else ""
            )
            raise UsageError(
                f"{where}{self.name} merges {wanted} model{'s' * (wanted[-1] != '1')}{beside}, found {found}"
            )


_DOCS = "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md"
_EACH = Parameter(1.0, "not base")

WHOLE: dict[str, WholeMethod] = {
    method.name: method
    for method in (
        WholeMethod(
            "linear",
            AVERAGE,
            "weighted sum of whole models over the sum of the weights",
            "https://arxiv.org/abs/2203.05482",
            {"weight": Parameter(1.0, "model"), "normalize": Parameter(True, kind=bool)},
        ),
        WholeMethod(
            "slerp",
            SLERP,
            "spherical interpolation of two models",
            "https://en.wikipedia.org/wiki/Slerp",
            {"t": Parameter(REQUIRED)},
            base="required",
            least=2,
            most=2,
        ),
        WholeMethod(
            "nuslerp",
            NUSLERP,
            "spherical interpolation of two models or task vectors",
            _DOCS,
            {
                "weight": _EACH,
                "nuslerp_row_wise": Parameter(False, kind=bool),
                "nuslerp_flatten": Parameter(True, kind=bool),
            },
            base="optional",
            least=2,
            most=2,
            bases_apart=True,
        ),
        WholeMethod(
            "multislerp",
            MULTISLERP,
            "barycentric interpolation on a sphere",
            "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
            {"weight": _EACH, "normalize_weights": Parameter(True, kind=bool), "eps": Parameter(1e-8)},
            base="optional",
            bases_apart=True,
        ),
        WholeMethod(
            "karcher",
            KARCHER,
            "mean of the directions on a sphere",
            "https://arxiv.org/abs/2603.04972",
            {"max_iter": Parameter(10, kind=int), "tol": Parameter(1e-5)},
        ),
        WholeMethod(
            "model_stock",
            MODEL_STOCK,
            "from the base towards the mean, as far as the directions agree",
            "https://arxiv.org/abs/2403.19522",
            {"filter_wise": Parameter(False, kind=bool)},
            base="required",
            least=3,
        ),
        WholeMethod(
            "nearswap",
            NEARSWAP,
            "towards the other model where it is near to the base",
            "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
            {"t": Parameter(REQUIRED)},
            base="required",
            least=2,
            most=2,
        ),
        WholeMethod(
            "arcee_fusion",
            ARCEE_FUSION,
            "the changes that matter most",
            _DOCS,
            {},
            base="required",
            least=2,
            most=2,
        ),
        WholeMethod(
            "passthrough",
            SCALED,
            "one model, scaled",
            _DOCS,
            {"scale": Parameter(None, "model")},
            most=1,
        ),
    )
}


def find_method(name: str) -> WholeMethod | str:
    """Look up a method by its name in a merge file.

    Args:
        name: The name.

    Returns:
        A method on whole models, or the name in taskvec of a method on task vectors.

    Raises:
        UsageError: There is no such method.
    """
    if name in WHOLE:
        return WHOLE[name]
    vector = VECTOR_NAMES.get(name, name)
    if vector in ("average", AUTO):
        return WHOLE["linear"] if vector == "average" else AUTO
    try:
        method_of(vector)
    except UsageError as error:
        if vector in METHODS or not str(error).startswith("no merge method"):
            raise UsageError(f"merge_method: {error}") from None  # the method of a package cannot be loaded
        known = sorted({*WHOLE, *VECTOR_NAMES, *METHODS, AUTO} - {"average"})
        raise UsageError(f"merge_method: no merge method {shown(name)}; known are {', '.join(known)}") from None
    return vector
