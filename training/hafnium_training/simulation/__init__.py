"""A card issuer that does not exist: the data source that the contract `examples/unified-risk` is written for.

This package is the one place that may know that contract's names, as any data source knows the names of its columns.
`folder.simulate` is the way in. Data from it is easier than the world's: docs/limits.md says by how much.
"""

from hafnium_training.simulation.folder import SimulationSummary, simulate
from hafnium_training.simulation.transactions import Disturbance

__all__ = ["Disturbance", "SimulationSummary", "simulate"]
