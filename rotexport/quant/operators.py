"""Which QuantizedLinear operator runs a site, decided from its schemes alone.

The kernels multiply groups of 32 to 256 elements, or whole rows, and read 16 bytes of activations at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from rotexport.quant.plan import SitePlan, WeightForm

BITS: Final = {"int8": 8, "int4": 4}
FORMS: Final = {("int8", "int8"): "W8A8", ("int4", "int8"): "W4A8", ("int4", "int4"): "W4A4"}
SLICE: Final = 32  # elements that one matrix instruction adds
LARGEST_GROUP: Final = 256
LONGEST: Final = 1 << 17  # elements of a row: the sums of longer ones may pass 32 bits
LOAD_BITS: Final = 128


@dataclass(frozen=True)
class LinearOperator:
    """An operator and its sizes: `group` input channels share a weight scale, `length` is a padded row.

    With `row_groups` activations have a scale per group too.
    """

    form: str
    two_level: bool
    group: int
    length: int
    row_groups: bool

    @property
    def name(self) -> str:
        """Name of the operator without an ending."""
        return f"QuantizedLinear{self.form}{'TwoLevel' if self.two_level else ''}"

    @property
    def weight_bits(self) -> int:
        """Bits of a weight's code."""
        return int(self.form[1])

    @property
    def activation_bits(self) -> int:
        """Bits of an activation's code."""
        return int(self.form[3])

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.length // self.group


def linear_operator(site: SitePlan) -> LinearOperator | str:
    """Return the operator for a site, or the reason why there is none."""
    formats = (site.weights.format, site.activations.format)
    if not site.activations.enabled or site.activations.mode != "dynamic":
        return "its activations are not scaled as they come"
    if formats not in FORMS:
        return f"there is no kernel for {formats[0]} weights and {formats[1]} activations"
    if not site.weights.symmetric and site.form is not WeightForm.TWO_LEVEL:
        return "its weights have zero points"
    if not site.activations.symmetric:
        return "its activations have zero points"
    operator = _operator(site)
    return next(_refusals(site, operator), operator)


def with_operators(plan: Sequence[SitePlan]) -> list[SitePlan]:
    """Return the plan in which every site that an operator can run is to become one."""
    return [replace(site, operator=isinstance(linear_operator(site), LinearOperator)) for site in plan]


def _operator(site: SitePlan) -> LinearOperator:
    whole = -(-site.inputs // SLICE) * SLICE
    group = whole if site.form is WeightForm.PLAIN else site.product_group
    return LinearOperator(
        FORMS[site.weights.format, site.activations.format],
        two_level=site.form is WeightForm.TWO_LEVEL,
        group=group,
        length=-(-site.inputs // group) * group,
        row_groups=site.activation_group != site.inputs,
    )


def _refusals(site: SitePlan, operator: LinearOperator) -> Iterator[str]:
    if site.inputs * operator.activation_bits % LOAD_BITS:
        yield f"rows of {site.inputs} {site.activations.format} activations are no multiple of 16 bytes"
    if operator.row_groups and site.weight_group != site.activation_group:
        yield "groups of activations need the same groups of weights"
    if operator.group % SLICE:
        yield f"groups of {operator.group} are no multiple of {SLICE}"
    if site.form is WeightForm.GROUPED and operator.group > LARGEST_GROUP:
        yield f"groups of {operator.group} are above {LARGEST_GROUP}"
    if operator.length >= LONGEST:
        yield f"sums of {operator.length} products pass 32 bits"
