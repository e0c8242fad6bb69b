"""Mechanisms of mixed precision, each usable alone; none imports another."""
