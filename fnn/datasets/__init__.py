"""Data on the host and on the device: batches and splits, data that is made, data by name and from files."""
