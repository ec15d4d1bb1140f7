"""Every optimiser of optax and optax.contrib, found in the modules as they are installed.

`optimizers()` makes them. A public function that returns a transformation, or may (its return is not annotated), is called
with `learning_rate=RATE` if it takes one; those that need other arguments have them in `MADE`, and what is left out is in
`LEFT_OUT`, with the reason. A newer optax's optimiser comes in by itself, or fails the test that asks for its arguments.
"""

import inspect
import warnings

import jax
import optax
from optax import contrib

RATE = 0.02


def kernels(params):
    return jax.tree.map(lambda a: a.ndim > 1, params)


def labels(params):
    return jax.tree.map(lambda a: "kernel" if a.ndim > 1 else "vector", params)


def matrices(params):
    return jax.tree.map(lambda a: contrib.MuonDimensionNumbers(), params)


def every_second(step, **extra):
    return step % 2 == 0


MADE = {
    "optax.MultiSteps": lambda: optax.MultiSteps(optax.chain(optax.clip_by_global_norm(0.1), optax.lamb(RATE)), 2),
    "optax.adafactor": lambda: optax.adafactor(RATE, min_dim_size_to_factor=4),
    "optax.adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.01),
    "optax.add_decayed_weights": lambda: optax.add_decayed_weights(0.1, kernels),
    "optax.add_noise": lambda: optax.add_noise(0.1, 0.5, 3),
    "optax.apply_every": lambda: optax.chain(optax.apply_every(2), optax.sgd(RATE)),
    "optax.apply_if_finite": lambda: optax.apply_if_finite(optax.adam(RATE), 3),
    "optax.chain": lambda: optax.chain(optax.clip_by_global_norm(0.3), optax.adam(RATE)),
    "optax.clip": lambda: optax.clip(0.01),
    "optax.clip_by_block_rms": lambda: optax.clip_by_block_rms(0.01),
    "optax.clip_by_global_norm": lambda: optax.clip_by_global_norm(0.1),
    "optax.conditionally_mask": lambda: optax.conditionally_mask(optax.adam(RATE), every_second),
    "optax.conditionally_transform": lambda: optax.conditionally_transform(optax.adam(RATE), every_second, True),
    "optax.ema": lambda: optax.chain(optax.ema(0.9), optax.sgd(RATE)),
    "optax.flatten": lambda: optax.flatten(optax.adam(RATE)),
    "optax.freeze": lambda: optax.freeze(True),
    "optax.inject_hyperparams": lambda: optax.inject_hyperparams(optax.lamb)(optax.linear_schedule(RATE, 0, 9)),
    "optax.inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.lamb)(RATE),
    "optax.keep_params_nonnegative": lambda: optax.chain(optax.sgd(RATE), optax.keep_params_nonnegative()),
    "optax.lbfgs": lambda: optax.lbfgs(),
    "optax.masked": lambda: optax.chain(optax.masked(optax.adam(1.0), kernels), optax.scale(-RATE)),
    "optax.multi_transform": lambda: optax.multi_transform(
        {"kernel": optax.adam(RATE), "vector": optax.sgd(RATE)}, labels
    ),
    "optax.named_chain": lambda: optax.named_chain(("clip", optax.clip(0.01)), ("adam", optax.adam(RATE))),
    "optax.noisy_sgd": lambda: optax.noisy_sgd(RATE, key=3),
    "optax.partition": lambda: optax.partition({"kernel": optax.adam(RATE), "vector": optax.set_to_zero()}, labels),
    "optax.scale": lambda: optax.scale(-RATE),
    "optax.scale_by_backtracking_linesearch": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(9, store_grad=True)
    ),
    "optax.scale_by_lbfgs": lambda: optax.chain(optax.scale_by_lbfgs(), optax.scale(-RATE)),
    "optax.scale_by_learning_rate": lambda: optax.scale_by_learning_rate(RATE),
    "optax.scale_by_schedule": lambda: optax.scale_by_schedule(optax.linear_schedule(-RATE, 0, 9)),
    "optax.scale_by_zoom_linesearch": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(9)),
    "optax.selective_transform": lambda: optax.selective_transform(optax.adam(RATE), freeze_mask=False),
    "optax.snapshot": lambda: optax.chain(optax.sgd(RATE), optax.snapshot("size", optax.tree.norm)),
    "optax.scale_by_distance_over_gradients": lambda: optax.chain(
        optax.scale_by_distance_over_gradients(0.01), optax.scale(-1.0)
    ),
    "optax.stateless": lambda: optax.stateless(
        lambda updates, params: jax.tree.map(lambda u, a: -RATE * u - 0.01 * a, updates, params)
    ),
    "optax.stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda u, a: -RATE * u - 0.01 * a),
    "optax.trace": lambda: optax.chain(optax.trace(0.9), optax.scale(-RATE)),
    "optax.with_extra_args_support": lambda: optax.with_extra_args_support(optax.adam(RATE)),
    "optax.zero_nans": lambda: optax.chain(optax.zero_nans(), optax.sgd(RATE)),
    "optax.contrib.galore": lambda: contrib.galore(RATE, 2),
    "optax.contrib.scale_by_galore": lambda: contrib.scale_by_galore(2),
    "optax.contrib.dadapt_adamw": lambda: contrib.dadapt_adamw(1.0, estim_lr0=0.01),
    "optax.contrib.dog": lambda: contrib.dog(1.0, ("heuristic", 0.01)),
    "optax.contrib.dowg": lambda: contrib.dowg(1.0, 0.01),
    "optax.contrib.mechanize": lambda: contrib.mechanize(optax.adam(1.0), s_init=0.01),
    "optax.contrib.prodigy": lambda: contrib.prodigy(1.0, estim_lr0=0.01),
    "optax.contrib.sam": lambda: contrib.sam(
        optax.adam(RATE), optax.chain(contrib.normalize(), optax.sgd(0.05)), opaque_mode=True
    ),
    "optax.contrib.scale_by_muon": lambda: optax.partition(
        {"kernel": contrib.scale_by_muon(weight_dimension_numbers=matrices), "vector": optax.sgd(RATE)}, labels
    ),
    "optax.contrib.schedule_free": lambda: contrib.schedule_free(optax.sgd(RATE), RATE),
    "optax.contrib.sophia": lambda: contrib.sophia(RATE, update_interval=2),
    "optax.contrib.split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(optax.adam(RATE)),
}

LEFT_OUT = {
    "optax.GradientTransformation": "the type of all of them",
    "optax.GradientTransformationExtraArgs": "the type of all of them",
    "optax.lookahead": "needs LookaheadParams, two trees of parameters; fnn.optimizers.lookahead keeps one",
    "optax.contrib.differentially_private_aggregate": "takes single examples' gradients, not their mean",
    "optax.contrib.dpsgd": "takes single examples' gradients, not their mean",
    "optax.monitor": "its state gains arrays in the first step, which a scan cannot carry by hand either",
    "optax.measure_with_ema": "returns a measurement instead of updates, for optax.monitor",
    "optax.bias_correction": "a function of moments",
    "optax.WrappedSchedule": "a schedule",
    "optax.matrix_inverse_pth_root": "a function of matrices",
    "optax.sigmoid_binary_cross_entropy": "a loss",
    "optax.update_infinity_moment": "a function of moments",
    "optax.update_moment": "a function of moments",
    "optax.update_moment_per_elem_norm": "a function of moments",
    "optax.contrib.schedule_free_eval_params": "a function of a state and parameters",
}
"""What returns no transformation, or one that does not work on a plain tree of parameters."""


def candidates():
    """Names of all public functions of optax that return a transformation, or may."""
    found = {}
    for module in (optax, contrib):
        for name, function in vars(module).items():
            kind = getattr(function, "__module__", "")
            if name.startswith("_") or not callable(function) or kind in ("typing", "collections.abc"):
                continue
            if inspect.isclass(function):
                if hasattr(function, "init") and hasattr(function, "update"):
                    found[f"{module.__name__}.{name}"] = function
                continue
            try:
                annotation = inspect.signature(function).return_annotation
            except (TypeError, ValueError):
                continue
            if annotation is inspect.Signature.empty or "GradientTransformation" in str(annotation):
                found[f"{module.__name__}.{name}"] = function
    return found


def make(name):
    """Make the optimiser of a name, or say which arguments it needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if name in MADE:
            return MADE[name]()
        function = candidates()[name]
        takes = inspect.signature(function).parameters
        return function(**({"learning_rate": RATE} if "learning_rate" in takes else {}))
