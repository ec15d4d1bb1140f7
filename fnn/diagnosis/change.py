"""A change of a training that a diagnosis tries."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fnn.diagnosis.case import Plan


@dataclass(frozen=True)
class Change:
    """One thing changed."""

    name: str
    """As the report says it: "standardise x"."""
    causes: tuple[str, ...]
    """What it repairs."""
    apply: Callable[[Plan], Plan]
    code: str
    """What to write to do it for good."""
    own_program: bool = False
    """Whether the net, the loss, the optimiser or a shape differs, so that a program must be compiled."""
    costs: float = 1.0
    """How many times a step's work it takes, about."""
    together: tuple["Change", ...] = ()
    """Of several changes at once each one."""
    on_suspicion: bool = False
    """Whether it is tried only if something that it repairs was measured."""


def setting(**values: Any) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, **values)
