"""The page at /: a live map of the KV pool, the requests in it, and a prompt box. ``quire top`` reads the same feed.

``feed`` asks the engine for snapshots while somebody watches, and no longer; ``picture`` is what watchers are sent, whole or as what
changed; ``latency`` and ``advice`` are numbers and words in it. ``static`` is plain HTML, CSS and JavaScript modules; ``assets`` serves
it. Reading only: nothing here changes what the server does.
"""
