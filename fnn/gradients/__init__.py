"""Gradients looked at: programs read, examples told apart, norms at any scale.

`program` alone reads jaxprs. `per_example` and `noise` measure single examples; `flow` measures layers.
"""
