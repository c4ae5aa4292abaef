"""Which int8 kernels a target's instruction set gives the runtimes, said before anyone deploys.

    x86-64            vpmaddubsw + vpmaddwd   u8 * s8, pairs added in int16 with saturation: weights of 7 bits
    x86-64-vnni       vpdpbusd                u8 * s8, four products added in int32, exact
    aarch64           smull / smlal           s8 * s8 in int16, widened by hand: no dot product
    aarch64-dotprod   sdot                    s8 * s8, four products added in int32, exact
    armv7l            vmull.s8 / vmlal.s16    the same in 32-bit NEON: no dot product

**Source** Intel 64 and IA-32 Architectures Software Developer's Manual (VPMADDUBSW, VPDPBUSD); Arm
Architecture Reference Manual for A-profile, FEAT_DotProd (SDOT: in Cortex-A55, A75, A76 and later, not in
A53 and A72).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from edgecnn.devices.capability import activation_dtype_for


@dataclass(frozen=True)
class Kernels:
    """What computes a convolution in int8.

    Attributes:
        instruction: the multiply-accumulate that the runtimes choose.
        exact: whether its sums cannot saturate with 8-bit weights.
        is_dot_product: whether it adds four products at once; without it int8 gains much less over float.
        width: output channels that it computes at a time; other widths cost as much as the next multiple.
        text: in one sentence.
    """

    instruction: str
    exact: bool
    is_dot_product: bool
    width: int
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, JSON-ready."""
        return asdict(self)


KERNELS = {
    "x86-64": Kernels(
        "vpmaddubsw",
        exact=False,
        is_dot_product=False,
        width=16,
        text="no VNNI: vpmaddubsw on uint8 * int8, whose sums saturate in int16, so weights get 7 bits",
    ),
    "x86-64-vnni": Kernels(
        "vpdpbusd",
        exact=True,
        is_dot_product=True,
        width=16,
        text="VNNI: vpdpbusd, four uint8 * int8 products at once, exact",
    ),
    "aarch64": Kernels(
        "smlal",
        exact=True,
        is_dot_product=False,
        width=8,
        text="no dot product: smull and smlal on int8, exact, but int8 gains less than where there is one",
    ),
    "aarch64-dotprod": Kernels(
        "sdot",
        exact=True,
        is_dot_product=True,
        width=16,
        text="dotprod: sdot, four int8 * int8 products at once, exact",
    ),
    "armv7l": Kernels(
        "vmlal",
        exact=True,
        is_dot_product=False,
        width=8,
        text="32-bit NEON, no dot product: vmull and vmlal, exact, but int8 gains less than with one",
    ),
}


def kernels_for(isa: str) -> Kernels:
    """Return the int8 kernels of an instruction set.

    Raises:
        DeviceError: for an unknown instruction set.

    Example:
        >>> kernels_for("aarch64-dotprod").instruction, kernels_for("x86-64").exact
        ('sdot', False)
    """
    activation_dtype_for(isa)
    return KERNELS[isa]
