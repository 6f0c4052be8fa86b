"""Hot operations: one folder each, with the plain version (the truth) beside the fast ones. See ``library.define``."""
