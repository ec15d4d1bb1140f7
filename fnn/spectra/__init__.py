"""Spectra of any loss: curvature, Jacobians, tangent kernels, and the stability of optimisers.

Matrices are never stored: `products` multiplies them with vectors, `krylov` finds their extreme eigenvalues, `operator` their traces and densities.
"""
