"""Benchmarks of fnn against its peers: `python -m bench --suite step`. Not part of the package."""
