"""What fnn adds to optax: wrappers of its transformations, and functions of parameter paths for its masks."""

from fnn.training.depth import per_depth as per_depth
from fnn.training.packing import packed as packed
