"""`python -m tests.ward [--seeds 9] [name ...]`: train patients, twins and controls; say which are as they should be.

With `--remedies` a control is not as it should be either if another rate, or standardised inputs, help it.
"""

import argparse
import fnmatch
import time

import jax
import numpy as np

from . import CONTROLS, PATIENTS, check, patients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["*"], help="patterns such as 'sgd*'; all by default")
    parser.add_argument("--seeds", type=int, default=9)
    parser.add_argument("--remedies", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compiling
    found = [*PATIENTS, *CONTROLS]
    chosen = [case for case in found if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.names)]
    wrong, twins = [], {}
    for case in chosen:
        start, sick, halves = time.perf_counter(), None, []
        if isinstance(case, patients.Patient):
            sick = check.train(case.make, options.seeds)
            halves = [check.train(half.case, options.seeds) for half in case.halves]
        if id(case.well) not in twins:  # many patients share a twin
            twins[id(case.well)] = check.train(case.well.case, options.seeds)
        well = twins[id(case.well)]
        good = bool(np.all(well >= case.bar) and (sick is None or np.all(sick < case.bar)))
        for half in halves:
            good = good and bool(np.all(half < case.bar))
            print(f"    one fault alone: {np.min(half):6.3f} to {np.max(half):6.3f}")
        if options.remedies and sick is None:
            tried = check.remedies(case.make, options.seeds)
            gains = {name: float(np.mean(scores) - np.mean(well)) for name, scores in tried.items()}
            best = max(gains, key=gains.__getitem__)
            good = good and gains[best] <= max(0.03, 2 * float(np.std(well)))
            print(f"    best remedy: {best} {gains[best]:+.3f}")
        shown = "" if sick is None else f"sick {np.min(sick):6.3f} to {np.max(sick):6.3f}   "
        wrong += [] if good else [case.name]
        seconds = time.perf_counter() - start
        print(
            f"{'ok ' if good else 'BAD'} {case.name:28} bar {case.bar:.2f}   {shown}"
            f"well {np.min(well):6.3f} to {np.max(well):6.3f}, spread {np.std(well):.3f}   {seconds:5.1f} s",
            flush=True,
        )
    print(f"{len(chosen) - len(wrong)} of {len(chosen)} as they should be{': not ' if wrong else ''}{', '.join(wrong)}")


if __name__ == "__main__":
    main()
