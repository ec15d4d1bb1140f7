"""Gradients looked at: programs read, examples told apart, norms at any scale.

`program` alone reads jaxprs. `exact` gives gradients of any size, as arrays with exponents. `per_example` and `noise` measure single examples; `flow` measures layers.
"""
