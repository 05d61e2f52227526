"""The page's files, as they are served: GET / and GET /page/{name}. They hold no secrets, and are open to everybody."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

FOLDER = Path(__file__).parent / "static"
INDEX = "index.html"
FILES = {
    "base.css": "text/css", "page.css": "text/css", "logo.svg": "image/svg+xml",
    "main.js": "text/javascript", "charts.js": "text/javascript", "feed.js": "text/javascript", "format.js": "text/javascript",
    "map.js": "text/javascript", "numbers.js": "text/javascript", "prompt.js": "text/javascript", "requests.js": "text/javascript",
}  # fmt: skip
"""Name → media type. Nothing else of the folder is served, whatever a path looks like."""
PATHS = frozenset({"/", *(f"/page/{name}" for name in FILES)})

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""Nothing comes from elsewhere, and nothing goes there."""


@dataclass(slots=True, frozen=True)
class Asset:
    body: bytes
    headers: dict[str, str]


def read(name: str) -> Asset:
    """One of FILES, or INDEX."""
    body = (FOLDER / name).read_bytes()
    return Asset(body, {
        "content-type": f"{FILES.get(name, 'text/html')}; charset=utf-8",
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",  # another version of the server has other files under the same names
        "etag": f'"{sha256(body).hexdigest()[:20]}"',
    })  # fmt: skip
