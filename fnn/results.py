"""A study's folder: description, finished cells, and the table that they make up.

    FOLDER/study.json            what was asked: axes, cells with their runs, recorded steps, data, chunk sizes
    FOLDER/sessions.json         who worked on it: a list of {started, versions, devices, commit, executor}
    FOLDER/cells/00000.parquet   one file per finished cell, numbered as in study.json; written to a temporary name
                                 and renamed, so that a file that is there is whole

`study.json` is an object: `format` (2), `axes` ({"static": [...], "traced": [...]}, names in column order), `cells` (a
list of {"static": {axis: value}, "runs": [{"seed": 0, "sigma_w": 1.0, ...}, ...], "chunk": runs at once}), `steps` (the
recorded steps, 0 first), `data`, `loss`, `build`, `quantities`, ...

The table is tidy and long: a row for each (cell, run, step, layer, path, quantity); nothing is averaged.

| column | type | |
|---|---|---|
| cell | Int32 | number of the cell: one combination of static axes, one compiled program |
| depth width activation norm residual clip batch_size optimizer init | Int32 Int32 String String Boolean String Int32 String String | static axes; with a `build=` of one's own, that function's axes instead |
| seed sigma_w sigma_b learning_rate clip_threshold | Int32 Float64 ... | traced axes: a run is one value of each |
| step | Int32 | updates done before the measurement; 0 is initialisation |
| layer | Int32 | counted by kernels, 1 next to the input; 0 for quantities of the whole run |
| path | String | of the parameter or tap, "" for quantities of the whole run |
| quantity | String | see below |
| value | Float64 | as measured; logs are natural; -inf is the log of zero |
| predicted low high | Float64 | theory at that layer and the band that 19 of 20 seeds stay in; null where there is none |
| outside | Boolean | whether value lies outside low..high; null where there is no band |

Quantities of a layer: `log_error`, log root mean over examples of |d l_i/dh|, at every tap (theory speaks of those
whose path ends in "preactivation", layers 1..depth+1, step 0); `log_kernel`, `log_bias` (and other parameters), log
Frobenius norm of the mean loss's gradient, and `log_kernel_rms`, per number; `mean`, `second_moment`, `dead`,
`saturated` at every tap; `update_ratio`, |update|/|weights| of the update that the optimiser takes next, and `cosine`
with the gradient at the recorded step before, both for every parameter.
Quantities of a run: at recorded steps `loss`, `accuracy` on the held-out examples; at every step of training (evenly
thinned to 256) `train_loss`, `train_accuracy`, `grad_norm`, `clip_fraction`, `clip_removed` on that step's batch; and
one row `diverged` for each run, 0 at its last step, or 1 at the step whose loss or gradient was not finite: the record
of that run ends there.

Read a folder with `results.read(folder)`: a `Results` with `.description` (study.json), `.sessions`, `.table()` (polars),
`.finished` (numbers of the finished cells) and `.times()`.
"""
