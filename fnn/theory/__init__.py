"""What mean-field theory and its corrections predict: Gaussian integrals, rates, spreads at finite width.

Nothing here looks at a network; `meanfield` is the public door.
"""
