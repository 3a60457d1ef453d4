"""Serve a model over HTTP: a page for people, and an interface for programs (extra ``serve``)."""
