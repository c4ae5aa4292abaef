"""Which channels stand and fall together: `couple_channels(model)` gives the groups any structured pruning
cuts.
"""

from edgecnn.graph.channels.coupling import couple_channels, macs_and_params
from edgecnn.graph.channels.records import Coupling, Group, Member, TensorInfo, WeightedLayer

__all__ = [
    "Coupling",
    "Group",
    "Member",
    "TensorInfo",
    "WeightedLayer",
    "couple_channels",
    "macs_and_params",
]
