"""The engine on a device that computes nothing: what a server will do, before it is there."""
