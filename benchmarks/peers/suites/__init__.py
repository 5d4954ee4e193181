"""The suites: one module a library, each with ``cases()``."""
