"""Clips in and out of files, the exact clock, sound and picture as arrays, shots and sync. NumPy and PyAV only."""
