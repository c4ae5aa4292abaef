"""What taking away one more channel saves, at the present state of a cut.

    macs(layer) = macs_0 (out_left / out_0) (in_left / in_0) (groups_0 / groups_left)

`groups_left` counts the groups with an output channel left, which is what a depthwise convolution (groups
go with channels) and a grouped one (channels are tied by their place in the group) both come to.
This model steers the order of a cut; the budget itself is checked by `macs_and_params`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgecnn.graph.channels import Coupling, WeightedLayer

Resource = Literal["macs", "params"]


class CutCost:
    """MACs and params of the weighted layers while channels go.

    Attributes:
        coupling: of the network.
        resource: what is counted.
    """

    def __init__(self, coupling: Coupling, resource: Resource) -> None:
        self.coupling = coupling
        self.resource = resource
        self._out = [len(layer.output_channels) for layer in coupling.layers]
        self._in = [len(layer.input_channels) for layer in coupling.layers]
        self._readers: dict[int, list[tuple[int, int, int]]] = _occurrences(coupling.layers)

    def saving(self, channel: int) -> float:
        """Return what goes with one channel now: MACs, or weights.

        Example: of a 1x1 convolution 4 -> 8 on 10 pixels (320 MACs), an output channel is worth 40.
        """
        saved = 0.0
        for index, outputs, inputs in self._readers.get(channel, ()):
            layer = self.coupling.layers[index]
            out_left, in_left = self._out[index], self._in[index]
            if out_left <= 0 or in_left <= 0:
                continue
            depthwise = layer.groups > 1 and layer.groups == len(layer.input_channels)
            full = layer.macs if self.resource == "macs" else layer.params
            out_0, in_0 = len(layer.output_channels), len(layer.input_channels)
            present = full * (out_left / out_0) * (1.0 if depthwise else in_left / in_0)
            share_out = min(outputs / out_left, 1.0)
            share_in = 0.0 if depthwise else min(inputs / in_left, 1.0)
            saved += present * (share_out + share_in - share_out * share_in)
        return saved

    def remove(self, channel: int) -> None:
        """Count a channel as gone."""
        for index, outputs, inputs in self._readers.get(channel, ()):
            self._out[index] -= outputs
            self._in[index] -= inputs


def _occurrences(layers: tuple[WeightedLayer, ...]) -> dict[int, list[tuple[int, int, int]]]:
    """Return channel id -> (layer index, output channels, input channels) it takes up there."""
    found: dict[int, dict[int, npt.NDArray[np.int64]]] = defaultdict(dict)
    for index, layer in enumerate(layers):
        for side, channels in enumerate((layer.output_channels, layer.input_channels)):
            for channel in channels:
                if channel >= 0:
                    found[channel].setdefault(index, np.zeros(2, np.int64))[side] += 1
    return {
        channel: [(index, int(n[0]), int(n[1])) for index, n in places.items()]
        for channel, places in found.items()
    }
