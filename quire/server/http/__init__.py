"""What every call passes, whatever it asks for: the protocol and its limits, keys, ids, errors, streams of events."""
