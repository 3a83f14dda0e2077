"""Buckets of each service, by the calls of its client library."""
