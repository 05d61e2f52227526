"""From a tenant and its ``cache_salt`` to the salt of a request: who shares cached prefixes with whom.

A salt that clients could choose outright would let one share the cache of another, and find out by timing what it asks. So
it is derived, with a key that is drawn when the server starts and never leaves the process.
"""

from __future__ import annotations

import os
from hashlib import blake2b

from quire.core.sequence import salt_bytes


class Salts:
    def __init__(self) -> None:
        self._key = os.urandom(32)

    def derive(self, cache_salt: str | None, tenant: bytes = b"") -> bytes:
        """The salt of a request; empty where it has neither ``cache_salt`` nor tenant. Raises InvalidRequestError."""
        salt = salt_bytes(cache_salt)
        if not salt and not tenant:
            return b""
        # With the tenant's length first, no other pair has the same bytes.
        return blake2b(len(tenant).to_bytes(8, "little") + tenant + salt, key=self._key, digest_size=32).digest()
