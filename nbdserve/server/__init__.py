"""Sockets, sessions and the dispatch of requests."""
