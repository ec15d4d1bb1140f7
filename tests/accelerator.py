"""Which tests run on an accelerator, `pytest -m accelerator -n 8`: values and laws, in two or three minutes on one GPU.

None of them needs a browser, child processes, several devices or the text of a program compiled for a CPU. PyTorch stays
out too: in one process with JAX it would bring CUDA libraries of its own.
"""


def words(text: str) -> list[str]:
    """Split at spaces and ends of lines."""
    return text.split()


LAWS = words("""
    dense activations conv_1d conv_2d conv_3d conv_transpose max_pool branches rnn lstm bidirectional tied attention_masked
    cross_attention batch_norm batch_norm_masked layer_norm tap_masked residual repeat mlp transformer_decoder
""")
"""Cases of the zoo that get the laws which cost one small program each."""


def of(test: str, cases: list[str] | str) -> list[str]:
    """Name some cases of one test."""
    return [f"{test}[{case}]" for case in (words(cases) if isinstance(cases, str) else cases)]


TESTS = {
    "activations": words("value_and_derivative low_precision nan_passes softmax"),
    "attention": words("""attention_equals_flax grouped_heads rotary padding_changes_nothing generate_with
        half_precision"""),
    "attention_masks": ["what_is_seen"],
    "clip": words("equals_numpy stacked_equals norms_whose infinity_is traced dtypes what_is_not"),
    "clip_reports": words("reports_by_hand a_zero_gradient an_infinite_gradient"),
    "conv": words("""conv_equals_flax implementations conv_transpose_equals pools conv_and_transpose
        global_average"""),
    "core": words("combinators dense_equals_numpy dropout_keeps"),
    "cross_attention": words("cross_attention_equals_flax padding_never"),
    "fit": words("an_error_in_the_second a_fraction_is_split"),
    "flax": ["mlp_with_batch_norm"],
    "diagnosis": ["weights_are_redrawn"],
    "diagnosis_scores": ["r2_at"],
    "exact": words("layers_of_one_array other_floats"),
    "exact_edges": words("a_sum_whose rows_of_an_array factors_that"),
    "flow": [
        *words("a_signal_that_leaves a_signal_of_normal what_leaves_float64"),
        *of("residual_nets_transformers_and_recurrences_have_float64s_log_norms_at_every_tap", "conv residual"),
    ],
    "gaussian": of("moments_agree_with_adaptive_quadrature", "tanh relu"),
    "initializers": [
        *of("mean_variance_and_kurtosis", "he-normal-dense lecun-truncated_normal-dense glorot-uniform-dense"),
        *words("orthogonal delta_orthogonal a_traced_scale"),
    ],
    "inputs": words("branches concatenate last_first padding_that_is_not_finite"),
    "laws": [
        *of("eval_needs_no_key_and_state_keeps_its_form", LAWS),
        *of("vmap_over_examples_equals_the_batch", LAWS),
        *of("bfloat16_in_and_out_with_float32_statistics", LAWS),
        *of("jit_equals_eager", "dense batch_norm"),
        *of("repeat_equals_serial", "dense rnn_masked attention batch_norm"),
        *of("gradients_agree_with_finite_differences_in_float64", "conv_2d lstm attention"),
        *of("values_at_padded_positions_change_nothing", "rnn_masked attention_masked each_position tied_masked"),
        *of(
            "per_example_gradients_equal_vmap_of_grad",
            "dense_on_sequences conv_2d repeat rnn_masked attention batch_norm tied",
        ),
        "the_integer_dtype_of_tokens",
    ],
    "losses": words("""cross_entropy binary_cross_entropy mse_is bfloat16_outputs the_integer_dtype_of_labels
        labels_out_of_range accuracy"""),
    "lowering": words("the_platform a_program_for who_computes programs_run_on where_jax_has_no_cpu"),
    "meanfield": ["lengths_of_residual_sums_are_those_of_a_net"],
    "meanfield_nets": words("batch_norm_rate_against_a_wide_net prediction_of_he_relu_over_seeds inside_a_trace"),
    "models": ["convnet_equals", *of("resnet_equals_flax", "bottleneck")],
    "noise": words("noise_scale jackknife"),
    "norm": words("batch_norm_in batch_norm_at derivative statistics_of norms_equal batch_norm_of_a_masked"),
    "optax_table": of("every_optimiser_of_optax_trains_nets_as_by_hand", "optax.contrib.sophia-looped"),
    "optimizers": of("depth_as_a_loop_trains_as_depth_written_out", "adam muon adafactor block_norms"),
    "overflow": ["a_run_that_overflows"],
    "packed": ["packed_changes_no_number"],
    "per_example": [
        *of(
            "every_method_equals_vmap_of_grad",
            "mlp nested depth_in_groups recurrent tied embedding conv conv_groups parts",
        ),
        *("over_seeds", "bfloat16_factors", "every_example_draws"),
    ],
    "per_example_norm": ["path_and_loss"],
    "precision": words("gradients_are_near_those_of_float32[gru] training_evaluation the_gradient_of_an_embedding"),
    "range": [
        *of("every_form_of_gradient_at_every_scale", "nested conv_groups recurrent embedding"),
        *words(
            "a_large_factor exploding_and trees_at clips_at one_example_far an_example_that_is_not a_gradient_beyond"
        ),
        "train_step_at",
    ],
    "recurrent": words("""values_and_gradients padding_changes pieces_equal tap_over_time bfloat16_keeps
        the_written_derivative"""),
    "study": words("every_number a_run_that_diverges neither_neighbours"),
    "swap": words("the_last_activation an_lstm"),
    "taps": words("""forward_statistics error_signal gradient_flow_equals gradient_flow_through
        a_deep_sigmoid_net_is_finite_in_low_precision_with_the_predicted_slope[bfloat16-400]"""),
    "tokens": ["embed_equals"],
    "train": words("""a_step_equals the_update_ratio buffers bfloat16_keeps fit_equals gradients_average digits_reach
        a_bad_batch_stays_out_of_the_nets_state[apply_if_finite-axis_name]"""),
    "tree": words("""size_norm sums_are float64 norms_are_right exploded a_norm_may zero_infinite log_norm_over
        norm_under_vmap"""),
    "watch": words("a_scan_has_a_row statistics_at_any attention_by_head"),
}
"""Tests by module, each without `test_` and by the start of its name."""


def file_is_chosen(name: str) -> bool:
    """Whether a file of this name may hold tests for an accelerator."""
    return not name.startswith("test_") or name.removeprefix("test_").removesuffix(".py") in TESTS


def chosen(module: str, test: str) -> str | None:
    """Return the entry of the table that a test is meant by."""
    entries = TESTS.get(module.removeprefix("test_"), ())
    return next((entry for entry in entries if test.removeprefix("test_").startswith(entry)), None)
