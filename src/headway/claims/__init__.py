"""Published claims, measured here: one file a system. See :mod:`headway.claims.measure`."""
