"""`python -m tests.ward [--seeds 9] [name ...]`: train patients, twins and controls; say which are as they should be."""

import argparse
import fnmatch
import time

import numpy as np

from . import check, controls, patients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["*"], help="patterns such as 'sgd*'; all by default")
    parser.add_argument("--seeds", type=int, default=9)
    options = parser.parse_args()
    found = [*patients.ALL, *controls.ALL]
    chosen = [case for case in found if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.names)]
    wrong, twins = [], {}
    for case in chosen:
        start, sick = time.perf_counter(), None
        if isinstance(case, patients.Patient):
            sick = check.train(case.make, options.seeds)
        if id(case.well) not in twins:  # many patients share a twin
            twins[id(case.well)] = check.train(case.well.case, options.seeds)
        well = twins[id(case.well)]
        good = bool(np.all(well >= case.bar) and (sick is None or np.all(sick < case.bar)))
        wrong += [] if good else [case.name]
        shown = "" if sick is None else f"sick {np.min(sick):6.3f} to {np.max(sick):6.3f}   "
        seconds = time.perf_counter() - start
        print(
            f"{'ok ' if good else 'BAD'} {case.name:28} bar {case.bar:.2f}   {shown}"
            f"well {np.min(well):6.3f} to {np.max(well):6.3f}, spread {np.std(well):.3f}   {seconds:5.1f} s",
            flush=True,
        )
    print(f"{len(chosen) - len(wrong)} of {len(chosen)} as they should be{': not ' if wrong else ''}{', '.join(wrong)}")


if __name__ == "__main__":
    main()
