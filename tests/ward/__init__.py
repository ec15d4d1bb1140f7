"""Trainings with a known cause of failure, each beside a healthy twin, and healthy trainings that look ill.

`patients.PUBLIC` and `controls.PUBLIC` are the published ones; nothing was tuned on those of `own_patients` and `own_controls`.
`python -m tests.ward` trains them all on nine seeds and says which are as they should be.
"""

from .controls import PUBLIC as PUBLIC_CONTROLS
from .own_controls import OWN as OWN_CONTROLS
from .own_patients import OWN as OWN_PATIENTS
from .patients import PUBLIC as PUBLIC_PATIENTS

PATIENTS = (*PUBLIC_PATIENTS, *OWN_PATIENTS)
CONTROLS = (*PUBLIC_CONTROLS, *OWN_CONTROLS)
