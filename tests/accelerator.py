"""Which tests run on an accelerator, `pytest -m accelerator -n 8`: values and laws, in two or three minutes on one GPU.

None of them needs a browser, child processes, several devices or the text of a program compiled for a CPU.
"""

LAWS = (
    *("dense", "dense_on_sequences", "activations", "dropout", "conv_1d", "conv_2d", "conv_2d_circular", "conv_3d"),
    *("conv_transpose", "max_pool", "avg_pool", "branches", "rnn", "lstm", "bidirectional", "embed", "tied"),
    *("attention", "attention_masked", "cross_attention", "batch_norm", "batch_norm_masked", "layer_norm"),
    *("group_norm", "tap_masked", "residual", "repeat", "repeat_of_repeat", "mlp", "transformer_decoder"),
)
"""Cases of the zoo that get the laws which cost one small program each."""

TESTS = {
    "activations": ("value_and_derivative", "low_precision", "nan_passes", "softmax_and", "softmax_is_finite"),
    "attention": (
        *("attention_equals", "grouped_heads", "rotary", "padding_changes_nothing", "pieces_equal_the_whole"),
        *("generate_with", "embed_equals"),
    ),
    "clip": ("equals_numpy", "stacked_equals", "norms_whose", "infinity_is", "reports_by_hand", "traced", "dtypes"),
    "conv": (
        "conv_equals",
        "implementations",
        "conv_transpose_equals",
        "pools",
        "conv_and_transpose",
        "global_average",
    ),
    "core": ("combinators", "dense_equals_numpy", "dropout_keeps"),
    "cross_attention": ("cross_attention_equals", "padding_never", "decoding_equals", "gradient_flow_of"),
    "fit": ("an_error_in_the_second", "a_fraction_is_split"),
    "flax": ("mlp_with_batch_norm",),
    "flow": ("a_signal_that_leaves", "a_signal_of_normal", "what_leaves_float64", "shifts_of_the_scales"),
    "gaussian": ("moments_agree_with_adaptive_quadrature[tanh]", "moments_agree_with_adaptive_quadrature[relu]"),
    "initializers": ("mean_variance", "orthogonal", "delta_orthogonal", "a_traced_scale"),
    "inputs": ("branches", "concatenate", "last_first", "trees_of_inputs", "padding_that_is_not_finite"),
    "laws": (
        *(f"eval_needs_no_key_and_state_keeps_its_form[{name}]" for name in LAWS),
        *(f"vmap_over_examples_equals_the_batch[{name}]" for name in LAWS),
        *(f"bfloat16_in_and_out_with_float32_statistics[{name}]" for name in LAWS),
        *(f"jit_equals_eager[{name}]" for name in ("dense", "batch_norm")),
        *(f"repeat_equals_serial[{name}]" for name in ("dense", "conv_1d", "lstm", "attention", "batch_norm")),
        *(f"gradients_agree_with_finite_differences_in_float64[{name}]" for name in ("conv_2d", "lstm", "attention")),
        *(f"values_at_padded_positions_change_nothing[{name}]" for name in ("rnn_masked", "attention_masked")),
        *(f"values_at_padded_positions_change_nothing[{name}]" for name in ("each_position", "tied_masked")),
        "the_integer_dtype_of_tokens",
        *(f"per_example_gradients_equal_vmap_of_grad[{name}]" for name in ("dense_on_sequences", "conv_2d", "repeat")),
        *(f"per_example_gradients_equal_vmap_of_grad[{name}]" for name in ("lstm", "attention", "batch_norm", "tied")),
    ),
    "losses": (
        *("cross_entropy", "binary_cross_entropy", "mse_is", "bfloat16_outputs", "the_integer_dtype_of_labels"),
        *("labels_out_of_range", "accuracy"),
    ),
    "lowering": ("the_platform", "other_platforms", "a_program_for"),
    "meanfield": (
        *("lengths_of_residual_sums_are_those_of_a_net", "batch_norm_rate_against_a_wide_net"),
        *("prediction_of_he_relu_over_seeds", "inside_a_trace"),
    ),
    "models": ("convnet_equals", "resnet_equals", "skip_init", "models_report"),
    "noise": ("noise_scale", "jackknife"),
    "norm": ("batch_norm_in", "batch_norm_at", "derivative", "statistics_of", "norms_equal", "batch_norm_of_a_masked"),
    "optimizers": (
        *(
            f"depth_as_a_loop_trains_as_depth_written_out[{name}]"
            for name in ("adam", "muon", "adafactor", "block_norms")
        ),
        *("packed_changes_no_number", "a_zero_gradient", "an_infinite_gradient"),
    ),
    "overflow": ("a_run_that_overflows",),
    "per_example": (
        *("every_method_equals_vmap_of_grad", "over_seeds", "bfloat16_factors", "gradients_made_in_parts"),
        "every_example_draws",
    ),
    "per_example_norm": ("path_and_loss", "frozen_statistics"),
    "per_example_train": ("train_step_with",),
    "precision": ("gradients_are_near", "training_evaluation", "the_gradient_of_an_embedding", "statistics_stay"),
    "range": (
        *("every_form_of_gradient_at_every_scale[depth]", "every_form_of_gradient_at_every_scale[conv_groups]"),
        *("every_form_of_gradient_at_every_scale[tied]", "every_form_of_gradient_at_every_scale[sequences]"),
        *("a_large_factor", "exploding_and", "trees_at", "clips_at", "one_example_far", "an_example_that_is_not"),
        *("a_gradient_beyond", "train_step_at"),
    ),
    "recurrent": (
        *("values_and_gradients", "gate_order", "padding_changes", "pieces_equal", "tap_over_time", "bfloat16_keeps"),
        "the_written_derivative",
    ),
    "study": ("every_number", "a_run_that_diverges", "neither_neighbours"),
    "taps": (
        *("forward_statistics", "no_layer_sends", "error_signal", "taps_under_vmap", "gradient_flow_equals"),
        *("gradient_flow_through", "a_deep_sigmoid", "zero_and_non_finite"),
    ),
    "train": (
        *(
            "a_step_equals",
            "metrics_by_choice",
            "the_update_ratio",
            "buffers",
            "bfloat16_keeps",
            "fit_equals",
            "fit_takes",
        ),
        *("evaluate_counts", "early_stopping", "gradients_average", "digits_reach", "steps_called", "a_skipped_step"),
    ),
    "tree": (
        *("size_norm", "sums_are", "float64", "norms_are_right", "exploded", "a_norm_may", "zero_infinite"),
        *("log_norm_over", "norm_under_vmap"),
    ),
}
"""Tests by module, each without `test_` and by the start of its name."""


def file_is_chosen(name: str) -> bool:
    """Whether a file of this name holds tests for an accelerator."""
    return not name.startswith("test_") or name.removeprefix("test_").removesuffix(".py") in TESTS


def chosen(module: str, test: str) -> str | None:
    """Return the entry of the table that a test is meant by."""
    entries = TESTS.get(module.removeprefix("test_"), ())
    return next((entry for entry in entries if test.removeprefix("test_").startswith(entry)), None)
