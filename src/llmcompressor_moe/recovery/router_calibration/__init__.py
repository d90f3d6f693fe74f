"""Routers adjusted to what compression left: recorded before, fitted after, judged on held-out data."""
