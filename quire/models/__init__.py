"""One decoder-only transformer, described by data: ``spec`` (what it is), ``families`` (whose files say so), ``weights``."""
