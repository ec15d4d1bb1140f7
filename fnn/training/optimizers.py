"""What fnn adds to optax: wrappers of its transformations, and masks by parameters' paths."""

from fnn.training.averages import averaged as averaged
from fnn.training.averages import eval_params as eval_params
from fnn.training.averages import lookahead as lookahead
from fnn.training.chosen import freeze as freeze
from fnn.training.chosen import where as where
from fnn.training.depth import per_depth as per_depth
from fnn.training.depth import stacked as stacked
from fnn.training.loss_scale import loss_scaled as loss_scaled
from fnn.training.loss_scale import scale_of as scale_of
from fnn.training.packing import packed as packed
from fnn.training.parametrized import parametrized as parametrized
