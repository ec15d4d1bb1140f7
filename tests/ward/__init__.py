"""Trainings with a known cause of failure, each beside a healthy twin, and healthy trainings that look ill.

`patients.PUBLIC` and `controls.PUBLIC` are the published ones; `OWN` beside them are those that nothing was tuned on.
`python -m tests.ward` trains them all on nine seeds and says which are as they should be.
"""
