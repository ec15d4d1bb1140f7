"""Which cases run with `--slow` alone, each with the quick test of the same law that stands for it.

By module: {quick test: slow ones}, names without `test_`; a quick test of another file is `file/test`. Some files mark slow
tests themselves, where they make their cases.
"""

from accelerator import of

TABLE = {
    "attention": {
        "generate_continues_behind_the_last_real_token_wherever_padding_stands[learned_scanned]": of(
            "generate_continues_behind_the_last_real_token_wherever_padding_stands", "tied masked_logits"
        ),
        "half_precision_is_near_float32_in_values_gradients_and_single_examples[causal]": of(
            "half_precision_is_near_float32_in_values_gradients_and_single_examples", "grouped window"
        ),
    },
    "attention_masks": {
        "pieces_equal_the_whole[window]": of("pieces_equal_the_whole", "function table"),
        "what_is_seen_equals_a_loop_in_float64[causal_rule-padded]": of(
            "what_is_seen_equals_a_loop_in_float64",
            "causal_rule-whole rule-padded rule-whole itself-padded itself-whole",
        ),
        "what_is_seen_equals_a_loop_in_float64[causal_pairs-padded]": of(
            "what_is_seen_equals_a_loop_in_float64", "causal_pairs-whole pairs-padded pairs-whole"
        ),
        "what_is_seen_equals_a_loop_in_float64[window-padded]": of(
            "what_is_seen_equals_a_loop_in_float64", "causal_window-padded causal_window-whole"
        ),
        "cross_attention_sees_by_the_positions_of_both[table]": of(
            "cross_attention_sees_by_the_positions_of_both", "function pairs"
        ),
    },
    "bench": {
        "bfloat16_rows_round_and_agree[fnn-stretch]": of("bfloat16_rows_round_and_agree", "equinox nnx jax-unrolled"),
        "step_suite_checks_peers_times_them_and_writes": [
            "models_are_chosen_by_name_and_wrong_losses_are_reported_not_raised"
        ],
    },
    "checkpoint": {
        "a_run_that_is_interrupted_again_and_again_ends_with_the_same_bits[by steps]": of(
            "a_run_that_is_interrupted_again_and_again_ends_with_the_same_bits", ["a list"]
        ),
    },
    "cli": {
        "train_takes_every_model[transformer --width 8 --depth 1 --heads 2 --data number_words --encoder 1 --batch-size 2048-greedy decoding]": of(
            "train_takes_every_model",
            [
                "transformer --width 8 --depth 1 --heads 2 --data number_words --batch-size 512-greedy decoding",
                "rnn --width 8 --cell gru-test accuracy",
            ],
        ),
        "train_takes_every_model[convnet --width 4 --convs 1-test accuracy]": of(
            "train_takes_every_model", ["resnet --width 2 --blocks 1 --norm none-test accuracy"]
        ),
    },
    "cross_attention": {
        "encoder_decoder_equals_flax[pre_f64]": of("encoder_decoder_equals_flax", "pre_f32"),
        "cross_attention_equals_flax_with_masks[f64]": of("cross_attention_equals_flax_with_masks", "f32"),
    },
    "curvature": {
        "products_equal_dense_matrices[mlp]": of("products_equal_dense_matrices", "conv lstm attention"),
        "densities_at_any_scale[1e+25]": of("densities_at_any_scale", "1e-28"),
    },
    "diagnosis": {
        "the_gain_of_residual_sums_keeps_their_size[relu-0.0831890330807703]": of(
            "the_gain_of_residual_sums_keeps_their_size", "tanh-0.24253562503633297"
        ),
    },
    "diagnosis_data": {
        "the_guess_of_any_loss_is_its_best_constant[names0]": of(
            "the_guess_of_any_loss_is_its_best_constant", "names3"
        ),
    },
    "diagnosis_reads": {
        "a_recurrent_kernel_that_forgets_is_measured_and_drawn_orthogonal[0.02-True]": of(
            "a_recurrent_kernel_that_forgets_is_measured_and_drawn_orthogonal", "1.0-False"
        ),
    },
    "diagnosis_repairs": {
        "nets_that_cannot_move_say_nothing_of_their_loss[zeros]": of(
            "nets_that_cannot_move_say_nothing_of_their_loss", "NaN"
        ),
        "targets_that_are_compared_with_all_outputs[shape2-True-False]": of(
            "targets_that_are_compared_with_all_outputs", "shape0-False-True"
        ),
        "labels_without_a_gradient[labels2-want2]": of("labels_without_a_gradient", "labels0-want0"),
        "class_weights_upside_down[weights0-False]": of("class_weights_upside_down", "weights1-False weights3-False"),
    },
    "diagnosis_search": {
        "a_loss_that_bfloat16_rounds_away": ["any_loss"],
    },
    "diagnosis_report": {
        "theory_of_a_report_is_that_of_this_width[batch_norm]": of("theory_of_a_report_is_that_of_this_width", "none"),
    },
    "diff": {
        "another_epsilon_between_layers": ["another_epsilon_in_one_norm"],
        "ports_of_one_mlp_are_equal[linen]": of("ports_of_one_mlp_are_equal", "equinox"),
        "diff_forms/a_recurrent_net_in_a_scan_and_written_out": ["a_scan_over_blocks_is_equal_to_blocks_written_out"],
    },
    "drawn": {
        "drawn_nets_are_those_with_weights[relu-batch_norm-0.5-8]": of(
            "drawn_nets_are_those_with_weights", "tanh-none-0.5-4"
        ),
        "drawn_nets_are_those_with_weights[sigmoid-none-None-1]": of(
            "drawn_nets_are_those_with_weights",
            "tanh-none-None-1 tanh-none-None-20 relu-batch_norm-None-6 erf-none-None-3",
        ),
    },
    "eigenvalues": {
        "no_record_misses_an_eigenvalue_that_has_passed_the_others[2-top-0.02]": of(
            "no_record_misses_an_eigenvalue_that_has_passed_the_others",
            "2-top-0.0 2-top-0.3 1-top-0.0 1-top-0.02 1-top-0.3 1-bottom-0.0 1-bottom-0.02 1-bottom-0.3",
        ),
        "large_matrices_of_zeros_and_of_low_rank[2-bottom]": of("large_matrices_of_zeros_and_of_low_rank", "1-top"),
        "eigenvalues_at_any_scale[1e-30]": of("eigenvalues_at_any_scale", "1e+30"),
        "tracking_the_sharpness_of_digits_costs_few_products[0.02-6-10]": [
            *of("tracking_the_sharpness_of_digits_costs_few_products", "1-2-3"),
            *["sharpness_of_a_net_at_the_edge_of_stability_is_that_of_the_dense_hessian"],
        ],
    },
    "exact": {
        "equals_the_plain_gradient_and_keeps_its_digits_when_the_seed_leaves_float32[nested scans]": of(
            "equals_the_plain_gradient_and_keeps_its_digits_when_the_seed_leaves_float32",
            ["lstm", "softmax", "layer norm", "dense"],
        ),
        "layers_of_one_array_keep_their_logs_however_they_are_taken_from_it[by_traced_index]": of(
            "layers_of_one_array_keep_their_logs_however_they_are_taken_from_it", "by_index"
        ),
    },
    "exact_models": {
        "a_scan_of_400_sigmoid_layers": ["linen_sigmoid_net_of_60_layers"],
        "models_of_others_where_float32_holds_the_gradient[lstms_over_200_steps_in_a_scan_over_4_layers]": of(
            "models_of_others_where_float32_holds_the_gradient", "nnx_attention"
        ),
    },
    "experiments": {
        "tiny_version_holds[two_inputs]": of("tiny_version_holds", "catapult"),
    },
    "finite_width": {
        "residual_prediction[gelu-1.0-0.1]": of("residual_prediction", "tanh-1.5-0.3 relu-1.4-0.0"),
        "mean_and_spread_of_the_log[tanh-2.5-0.1-1.0]": of(
            "mean_and_spread_of_the_log",
            "selu-1.0-0.0-1.0 gelu-2.0-0.0-1.0 tanh-1.0-0.0-1.0 softplus-1.0-0.1-1.0 silu-1.2-0.2-2.0 leaky_relu-1.4-0.2-1.0",
        ),
    },
    "flax": {
        "mlp_with_batch_norm_equals_flax[64-scanned]": of("mlp_with_batch_norm_equals_flax", "64-unrolled"),
    },
    "flow": {
        "a_signal_that_leaves_float32_is_measured_in_float64[lost_between_taps]": of(
            "a_signal_that_leaves_float32_is_measured_in_float64", "exploding tiny_inputs leaky_relu"
        ),
        "blocks_in_groups_have_the_same_norms[{'checkpoint': 9}]": of(
            "blocks_in_groups_have_the_same_norms", ["{'unroll': 4}"]
        ),
        "what_leaves_float64_too_is_nan_and_the_layer_is_named[0.001-80-105]": of(
            "what_leaves_float64_too_is_nan_and_the_layer_is_named", "10000.0-36-46"
        ),
        "combinators_of_ones_own_whose_paths_meet_equal_float64[repeated]": of(
            "combinators_of_ones_own_whose_paths_meet_equal_float64", "one_behind_the_other sum skip one_tap"
        ),
        "layers_are_counted_by_their_weights[cells]": of("layers_are_counted_by_their_weights", "lstm conv attention"),
        "residual_nets_transformers_and_recurrences_have_float64s_log_norms_at_every_tap[residual]": of(
            "residual_nets_transformers_and_recurrences_have_float64s_log_norms_at_every_tap", "lstm"
        ),
    },
    "jacobian": {
        "isometry_and_extremes_at_any_scale[4-1e-28]": of("isometry_and_extremes_at_any_scale", "4-1e+28 64-1e-28"),
        "extremes_are_numpys_and_know_how_good_they_are[shape0]": of(
            "extremes_are_numpys_and_know_how_good_they_are", "shape1 shape2"
        ),
    },
    "kernel": {
        "the_kernel_is_that_of_stored_jacobians[mlp]": of("the_kernel_is_that_of_stored_jacobians", "conv"),
        "wide_nets_come_near[relu]": of("wide_nets_come_near", "tanh"),
    },
    "laws": {
        "repeat_equals_serial[rnn_masked]": of(
            "repeat_equals_serial", "lstm shared conv_1d dense_on_sequences positions"
        ),
        "repeat_equals_serial[attention]": of("repeat_equals_serial", "group_norm layer_norm tap_masked"),
        "per_example_gradients_equal_vmap_of_grad[rnn_masked]": of("per_example_gradients_equal_vmap_of_grad", "lstm"),
        "jit_equals_eager[batch_norm_masked]": of("jit_equals_eager", "rnn_masked tap_masked"),
        "values_at_padded_positions_change_nothing[backwards]": of(
            "values_at_padded_positions_change_nothing", "transformer_encoder bidirectional"
        ),
    },
    "losses": {
        "the_integer_dtype_of_labels_does_not_matter[sequence_cross_entropy-shape2-labels2]": of(
            "the_integer_dtype_of_labels_does_not_matter",
            "sequence_cross_entropy-shape3-labels3 cross_entropy-shape1-labels1",
        ),
    },
    "lowering": {
        "a_step_on_a_gpu_waits_for_no_number[clipped]": of("a_step_on_a_gpu_waits_for_no_number", "plain"),
    },
    "models": {
        "resnet_equals_flax[bottleneck]": of("resnet_equals_flax", "basic"),
        "models_report_gradient_flow[rnn]": of("models_report_gradient_flow", "convnet"),
    },
    "optax_table": {
        "every_optimiser_of_optax_trains_nets_as_by_hand[optax.contrib.sophia-looped]": [
            *of("every_optimiser_of_optax_trains_nets_as_by_hand", "optax.lbfgs-looped optax.contrib.sam-written_out"),
            *of("every_optimiser_of_optax_treats_repeat_as_by_hand", "optax.contrib.sophia"),
        ],
        "every_optimiser_of_optax_trains_nets_as_by_hand[optax.contrib.sam-looped]": of(
            "every_optimiser_of_optax_treats_repeat_as_by_hand", "optax.contrib.sam"
        ),
        "every_optimiser_of_optax_treats_repeat_as_by_hand[optax.contrib.prodigy]": of(
            "every_optimiser_of_optax_treats_repeat_as_by_hand",
            "optax.contrib.mechanize optax.contrib.cocob optax.contrib.momo",
        ),
    },
    "optimizers": {
        "depth_as_a_loop_trains_as_depth_written_out[multi_steps]": of(
            "depth_as_a_loop_trains_as_depth_written_out", "global_norms apply_if_finite adamw_by_equal_path"
        ),
        "a_loop_and_layers_written_out_train_alike_by_the_train_step[decay]": of(
            "a_loop_and_layers_written_out_train_alike_by_the_train_step", "muon"
        ),
    },
    "outputs_losses": {
        "losses_that_are_made[focal]": of("losses_that_are_made", ["focal 0"]),
    },
    "overflow": {
        "its_neighbours_in_one_vmap_are_the_same_bits_whatever_it_does": of(
            "its_neighbours_are_those_of_a_study_without_it", "others0"
        ),
        "the_schema_of_a_cell_does_not_depend_on_its_numbers[options0]": of(
            "the_schema_of_a_cell_does_not_depend_on_its_numbers", "options1 options2 options3"
        ),
        "flow/a_net_that_casts_to_float32_itself_is_nan_and_says_so": [
            "a_net_that_cannot_be_measured_in_float64_stays_nan"
        ],
    },
    "per_example": {
        "every_method_equals_vmap_of_grad[nested]": of(
            "every_method_equals_vmap_of_grad", "depth depth_batch_norm depth_in_uneven_groups linen sequences nnx"
        ),
        "a_trace_that_reads_otherwise_is_stored_in_full_with_one_warning[scan]": of(
            "a_trace_that_reads_otherwise_is_stored_in_full_with_one_warning", "all"
        ),
    },
    "per_example_norm": {
        "path_and_loss_sum_to_the_batch_gradient[float64-1e-14]": of(
            "path_and_loss_sum_to_the_batch_gradient", "float32-1e-06"
        ),
    },
    "range": {
        "every_form_of_gradient_at_every_scale[nested]": of(
            "every_form_of_gradient_at_every_scale", "depth sequences layers_inside_time tied"
        ),
        "exploding_and_vanishing_nets[relu-61-init]": of("exploding_and_vanishing_nets", "sigmoid-29-glorot_uniform"),
        "a_large_factor_beside_a_small_one[gram]": of("a_large_factor_beside_a_small_one", "made"),
    },
    "recurrent": {
        "the_written_derivative_is_that_of_the_loop[lstm]": of("the_written_derivative_is_that_of_the_loop", "gru rnn"),
        "values_and_gradients_equal_flax_with_lengths[lstm-reverse_f64]": of(
            "values_and_gradients_equal_flax_with_lengths", "lstm-forward_f32"
        ),
    },
    "replay": {
        "deep_nets_with_clips_and_weights[packed]": of("deep_nets_with_clips_and_weights", "plain"),
    },
    "shared": {
        "a_scan_and_blocks_written_out_train_alike[muon]": of("a_scan_and_blocks_written_out_train_alike", "lamb adam"),
    },
    "spectra_corners": {
        "all_eigenvalues_and_the_trace_are_those_of_the_dense_hessian[scan]": of(
            "all_eigenvalues_and_the_trace_are_those_of_the_dense_hessian", "equinox cond tied"
        ),
        "numbers_at_any_scale_are_those_near_one[1e-30]": of("numbers_at_any_scale_are_those_near_one", "1e+30"),
        "tight_tolerances_are_proved[float64-relu]": of("tight_tolerances_are_proved", "float32-tanh"),
    },
    "stability": {
        "steps_grow_just_above_the_threshold_and_shrink_just_below[optimizer1]": of(
            "steps_grow_just_above_the_threshold_and_shrink_just_below", "optimizer0"
        ),
        "thresholds_and_preconditioned_sharpness[sgd]": of(
            "thresholds_and_preconditioned_sharpness", ["adam, other numbers"]
        ),
    },
    "study_pairs": {
        "a_study_measures_what_watch_does[plain]": of(
            "a_study_measures_what_watch_does", "in_equinox in_haiku in_linen"
        ),
    },
    "swap": {
        "linen_under_vmap_and_grad[relu]": of("linen_under_vmap_and_grad", "silu"),
        "an_activation_is_put_between_layers_that_follow_each_other_without_one[tanh]": of(
            "an_activation_is_put_between_layers_that_follow_each_other_without_one", "relu"
        ),
        "a_swapped_net_has_the_loss_and_gradient_of_the_net_built_so[tanh-1]": of(
            "a_swapped_net_has_the_loss_and_gradient_of_the_net_built_so",
            "gelu-1 gelu_tanh-1 softplus-1 elu-1 selu-1 leaky_relu-1",
        ),
    },
    "taps": {
        "gradient_flow_equals_float64_within_1e_4[at_init]": of(
            "gradient_flow_equals_float64_within_1e_4", "in_training"
        ),
    },
    "train": {
        "a_float32_net_trains_in_float32_under_x64[options2]": of(
            "a_float32_net_trains_in_float32_under_x64", "options0 options1"
        ),
    },
    "ward": {
        "a_patient_in_another_framework_has_the_same_loss[sigmoid_8-jax]": of(
            "a_patient_in_another_framework_has_the_same_loss", "relu_head_regression-jax"
        ),
    },
    "watch": {
        "gradients_are_those_of_jax[linen_transformer]": of(
            "gradients_are_those_of_jax", "linen_mlp plain_mlp haiku_mlp by_index fnn_residual"
        ),
    },
    "watch_deep": {
        "exact_models/the_slope_at_depth_2000_is_the_predicted_one": ["the_slope_at_depth_2000_is_the_predicted_one"],
    },
    "watch_exact": {
        "smooth_nets_end_to_end[equinox_net]": of("smooth_nets_end_to_end", "linen_net nnx_net haiku_net"),
        "other_nets_are_as_near_as_plain_gradients[lstms]": of("other_nets_are_as_near_as_plain_gradients", "convs"),
    },
    "weights_torch": {
        "outputs_equal_the_formulas_of_pytorch[lstm]": of("outputs_equal_the_formulas_of_pytorch", "stack"),
    },
}


def covering(module: str, test: str) -> str | None:
    """Return the quick test that stands for this one, or None if this one is quick."""
    name = test.removeprefix("test_").partition("@")[0]
    found = TABLE.get(module.removeprefix("test_"), {}).items()
    return next((quick for quick, slow in found if name in slow or name.partition("[")[0] in slow), None)


def missing(module: str, tests: list[str]) -> list[str]:
    """Return names of the table that no test of this module has, and quick ones that are slow themselves."""
    names = {name.removeprefix("test_").partition("@")[0] for name in tests}
    names |= {name.partition("[")[0] for name in names}
    found = TABLE.get(module.removeprefix("test_"), {})
    wrong = [name for quick, slow in found.items() for name in (quick, *slow) if name not in names and "/" not in name]
    return wrong + [quick for quick in found if covering(module, quick)]
